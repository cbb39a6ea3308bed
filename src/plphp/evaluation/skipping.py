# SPDX-License-Identifier: Apache-2.0
"""A broken image or prompt costs its own sample and no other: such samples are skipped, counted and named.

A sample is skipped for all methods, so that they are compared on the same ones. What is not about a sample (no memory,
a model that cannot be pruned, a mistake in the code) ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from plphp.errors import (
    BackendUnavailableError,
    CacheMemoryError,
    CacheStateError,
    LoadError,
    PLPHPError,
    UnsupportedModelError,
)
from plphp.io.quoting import one_line

from .answering import accepted_answers
from .conversation import prompt_inputs
from .scoring import Outcome
from .settings import AnyTask, EvalSettings
from .tasks import Task

if TYPE_CHECKING:
    from .tasks import Sample

Maker = Callable[[], "Sample"]
Score = Callable[[Sequence["Sample"]], list[dict[str, Outcome]]]
"""Outcomes by the name of the variant, for each of some samples."""
NOT_OF_A_SAMPLE = (BackendUnavailableError, CacheMemoryError, CacheStateError, UnsupportedModelError)
"""Errors that another sample would meet as well."""


def makers_of(task: AnyTask, settings: EvalSettings) -> Iterator[tuple[int, Maker]]:
    """Number the samples of a task, each made only when it is asked for: one that cannot be is not the end of all."""
    if isinstance(task, Task):
        for number, sample in enumerate(task.samples(settings.split, settings.samples, settings.seed)):
            yield number, lambda drawn=sample: drawn  # type: ignore[misc]
    else:
        yield from enumerate(task.makers[: settings.samples])


def first_usable(tasks: Sequence[AnyTask], settings: EvalSettings, processor: Any) -> Sample:
    """The first sample that can be read and prepared.

    Raises
    ------
    LoadError
        If there is none, with the reason against the first.
    """
    reason = "there is none"
    for task in tasks:
        for number, make in makers_of(task, settings):
            try:
                sample = make()
                prompt_inputs(processor, sample)
                return sample
            except PLPHPError as error:
                _end_unless_of_sample(error, task.name, number)
                reason = f"{task.name}, sample {number}: {error}" if reason == "there is none" else reason
    raise LoadError(f"No sample can be read and prepared; the first: {reason}")


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
        If it is not about a sample.
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
        [number, *others], first = samples, next(iter(samples.values()))
        if not others:
            return {number: _skipped(error, task, number, first.id)}
        _end_unless_of_sample(error, task, first.id)
    else:
        return {
            number: _record(number, sample, found)
            for (number, sample), found in zip(samples.items(), outcomes, strict=True)
        }
    # One of a batch has failed; which one, each alone will say.
    alone = [_scored(task, {number: sample}, score) for number, sample in samples.items()]
    return {number: record for records in alone for number, record in records.items()}


def _record(index: int, sample: Sample, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    references = [list(accepted_answers(sample, turn)) for turn, one in enumerate(sample.turns) if one.scored]
    outcome = {name: found.to_dict() for name, found in outcomes.items()}
    return {"index": index, "id": sample.id, "references": references, "outcomes": outcome}


def _skipped(error: PLPHPError, task: str, index: int, sample_id: str | None = None) -> dict[str, Any]:
    _end_unless_of_sample(error, task, index if sample_id is None else sample_id)
    return {"index": index, "id": sample_id, "skipped": one_line(error)}


def _end_unless_of_sample(error: PLPHPError, task: str, sample: object) -> None:
    if isinstance(error, NOT_OF_A_SAMPLE):
        raise type(error)(f"{task}, sample {sample}: {error}") from error
