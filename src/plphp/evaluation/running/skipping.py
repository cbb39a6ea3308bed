# SPDX-License-Identifier: Apache-2.0
"""A broken image or prompt costs its own sample alone: such samples are skipped, counted and named.

A sample is skipped for all methods, so that they are compared on the same samples. What is not about a sample (no
memory, a model that cannot be pruned, a mistake in the code) ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plphp.errors import (
    BackendUnavailableError,
    CacheMemoryError,
    CacheStateError,
    LoadError,
    PLPHPError,
    UnsupportedModelError,
)
from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.task import AnyTask, Maker, Sample
from plphp.io.quoting import one_line

from .conversation import prompt_inputs
from .scoring import Outcome
from .task_choice import makers_of

Score = Callable[[Sequence[Sample]], list[dict[str, Outcome]]]
"""Outcomes by the name of the variant, for each of some samples."""
NOT_OF_A_SAMPLE = (BackendUnavailableError, CacheMemoryError, CacheStateError, UnsupportedModelError)
"""Errors that the next sample would meet as well."""


def first_usable(tasks: Sequence[AnyTask], settings: EvalSettings, processor: Any) -> Sample:
    """The first sample that can be read and prepared.

    Raises
    ------
    LoadError
        If no sample can, with the reason against the first.
    """
    reasons = []
    for task in tasks:
        for number, make in enumerate(makers_of(task, settings)):
            try:
                sample = make()
                prompt_inputs(processor, sample)
                return sample
            except PLPHPError as error:
                end_unless_of_sample(error, task.name, number)
                reasons.append(f"{task.name}, sample {number}: {error}")
    raise LoadError(f"No sample can be read and prepared; the first: {[*reasons, 'there is none'][0]}")


def records_of(task: str, block: Sequence[tuple[int, Maker]], score: Score) -> list[dict[str, Any]]:
    """Make the samples of a block, score them together, and return a record for each.

    Parameters
    ----------
    task : str
        Name of the task.
    block : sequence of tuple
        Numbers of the samples, with their makers.
    score : callable
        Scores several samples.

    Returns
    -------
    list of dict
        In order: ``index``, ``id`` and either ``references`` and ``outcomes`` or, for a sample that failed by itself,
        the reason as ``skipped``.

    Raises
    ------
    PLPHPError
        If an error is not about a sample.
    """
    records: dict[int, dict[str, Any]] = {}
    samples: dict[int, Sample] = {}
    for number, make in block:
        try:
            samples[number] = make()
        except PLPHPError as error:
            records[number] = _skipped(error, task, number)
    records |= _scored(task, samples, score)
    return [records[number] for number in sorted(records)]


def _scored(task: str, samples: Mapping[int, Sample], score: Score) -> dict[int, dict[str, Any]]:
    if not samples:
        return {}
    try:
        outcomes = score(list(samples.values()))
    except PLPHPError as error:
        number, first = next(iter(samples.items()))
        if len(samples) == 1:
            return {number: _skipped(error, task, number, first.id)}
        end_unless_of_sample(error, task, first.id)
    else:
        return {
            number: _record(number, sample, by_variant)
            for (number, sample), by_variant in zip(samples.items(), outcomes, strict=True)
        }
    # The error does not say which sample of the batch it is about: scoring each alone does.
    alone = [_scored(task, {number: sample}, score) for number, sample in samples.items()]
    return {number: record for records in alone for number, record in records.items()}


def _record(index: int, sample: Sample, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    references = [list(sample.accepted_answers(number)) for number, turn in enumerate(sample.turns) if turn.scored]
    values = {name: outcome.to_dict() for name, outcome in outcomes.items()}
    about = {"ages": list(sample.ages)} if sample.ages else {}
    return {"index": index, "id": sample.id, **about, "references": references, "outcomes": values}


def _skipped(error: PLPHPError, task: str, index: int, sample_id: str | None = None) -> dict[str, Any]:
    end_unless_of_sample(error, task, index if sample_id is None else sample_id)
    return {"index": index, "id": sample_id, "skipped": one_line(error)}


def end_unless_of_sample(error: PLPHPError, task: str, sample: object) -> None:
    """Raise an error that the next sample would meet as well, with the sample's name."""
    if isinstance(error, NOT_OF_A_SAMPLE):
        raise type(error)(f"{task}, sample {sample}: {error}") from error
