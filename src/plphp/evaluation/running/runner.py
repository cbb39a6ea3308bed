# SPDX-License-Identifier: Apache-2.0
"""Run an evaluation: every sample that is not done yet, in this process or in several, and then the figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.foreign_banks import refuse_foreign_banks
from plphp.errors import ConfigError, LoadError, UnsupportedFeatureError, UnsupportedModelError
from plphp.evaluation.results.identity import identity
from plphp.evaluation.results.store import Store, write_json
from plphp.evaluation.results.summary import check_baseline, none_scored, summarize
from plphp.evaluation.settings import EvalSettings
from plphp.inputs.loading import load_model
from plphp.methods.registry import chain_of
from plphp.settings.checks import check_int

from .blocks import Remainder, remainder, shares
from .controls import smaller_inputs
from .conversation import prompt_inputs
from .own_banks import RunBanks, refuse_folders
from .run_config import run_config
from .scorer import Scorer, records_of_worker
from .skipping import first_usable
from .task_choice import TURNS, mode_of, refuse_turns, resolve_tasks
from .variants import Variant, make_variants
from .workers import run_workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.evaluation.tasks.task import Sample

log = logging.getLogger("plphp")

Progress = Callable[[str, int, int], None]
"""Called with the task of a finished sample, how many samples are done, and how many there are."""


def evaluate(
    settings: EvalSettings,
    out: str | Path,
    *,
    workers: int = 1,
    baseline: str | None = None,
    progress: Progress = lambda task, done, total: None,
) -> dict[str, Any]:
    """Score methods on tasks and write the results to a folder; what is there already is not done again.

    A sample that fails by itself is skipped for all methods, with a warning in the log, see
    `plphp.evaluation.running.skipping`; it is not tried again when the run goes on.

    Parameters
    ----------
    settings : EvalSettings
        What to do.
    out : str or Path
        Folder; see `plphp.evaluation.results.store`.
    workers : int
        Processes over which the samples are spread, each with the model and one thread. The numbers are the same.
    baseline : str, optional
        Label of the method from which the differences of all are given, beside those from ``full``.
    progress : callable
        Called after each sample.

    Returns
    -------
    dict
        The figures, as written to ``metrics.json``; see `plphp.evaluation.results.summary.summarize`.

    Raises
    ------
    ConfigError
        If a method, task or setting is not known or not for an evaluation, or the folder holds another evaluation.
    LoadError
        If the model or the data cannot be read, or all samples of a task had to be skipped: the results of the other
        tasks are written then.
    """
    check_int("workers", workers, minimum=1)
    # Everything that can be wrong with the settings comes before the weights, which may take minutes.
    tasks = resolve_tasks(settings)
    modes = {task.name: mode_of(task, settings.mode) for task in tasks}
    variants = _checked_variants(settings, baseline)
    model, processor = load_model(settings.model, settings.dtype, settings.device)
    sample, about = first_usable(tasks, settings, processor), identity(model)
    banks = RunBanks(Path(out), tasks, settings, about["model"]["sha256"])
    usable, refused = _usable(model, processor, variants, modes.values(), sample, banks)
    store = Store(out, run_config(settings, variants, refused, tasks, modes, about, banks))
    left = remainder(store, tasks, settings, modes)
    note = _Notes(store, left, progress)
    if workers == 1:
        for task, record in Scorer(model, processor, settings, usable).records(left.blocks):
            note(task, record)
    elif left.blocks:
        del model  # every process loads its own
        names = [variant.name for variant in usable]
        run_workers(records_of_worker, (settings, names, banks.files), shares(left.blocks, workers), note)
    return _written_figures(store.folder, baseline)


class _Notes:
    """Writes records down as they come, warns of skipped samples, and reports progress."""

    def __init__(self, store: Store, left: Remainder, progress: Progress) -> None:
        self._store, self._progress = store, progress
        self._done, self._total = left.done, left.total

    def __call__(self, task: str, record: Mapping[str, Any]) -> None:
        self._store.add(task, record)
        if "skipped" in record:
            name = record["index"] if record["id"] is None else record["id"]
            log.warning("%s: sample %s is skipped: %s", task, name, record["skipped"])
        self._done += 1
        self._progress(task, self._done, self._total)


def _checked_variants(settings: EvalSettings, baseline: str | None) -> list[Variant]:
    variants = make_variants(settings.methods, settings.retention)
    check_baseline(baseline, [variant.label for variant in variants])
    refuse_folders(variants)
    return variants


def _usable(
    model: PreTrainedModel,
    processor: Any,
    variants: Sequence[Variant],
    modes: Collection[str],
    sample: Sample,
    banks: RunBanks,
) -> tuple[list[Variant], dict[str, str]]:
    """The variants that this model can do, with their query banks; and by the names of the rest the reasons."""
    usable: list[Variant] = []
    refused: dict[str, str] = {}
    for variant in variants:
        try:
            named = banks.named(model, processor, variant)
            _check_variant(model, processor, named, modes, sample)
            usable.append(named)
        except (ConfigError, UnsupportedFeatureError, UnsupportedModelError) as error:
            log.warning("%s is left out: %s", variant.name, error)
            refused[variant.name] = str(error)
    return usable, refused


def _check_variant(
    model: PreTrainedModel, processor: Any, variant: Variant, modes: Collection[str], sample: Sample
) -> None:
    chain = chain_of(variant.config, model.config.get_text_config(decoder=True).num_hidden_layers)
    if {"generate", TURNS} & set(modes):
        chain.refuse_unanswered()
    refuse_turns(variant, modes)
    refuse_foreign_banks(chain, model)
    if variant.images == "smaller":
        smaller_inputs(model, processor, sample, variant.retention or 1.0)
    if chain.prefill is not None or chain.attention is not None:
        # What keeps a method from acting inside prefill is in the model's layers and its attention.
        PrunedCache.for_inputs(model, prompt_inputs(processor, sample), variant.config)


def _written_figures(folder: Path, baseline: str | None) -> dict[str, Any]:
    """Work out the figures and write them, before a task without any scored sample is refused."""
    metrics = summarize(folder, baseline)
    write_json(folder / "metrics.json", metrics)
    for name, samples in metrics["skipped"].items():
        if name not in metrics["tasks"]:
            raise LoadError(none_scored(name, samples))
    return metrics
