# SPDX-License-Identifier: Apache-2.0
"""Run an evaluation: every sample that is not done yet, in this process or in several, and then the figures."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.refusals import refuse_unanswered
from plphp.errors import ConfigError, LoadError, UnsupportedFeatureError, UnsupportedModelError, did_you_mean
from plphp.inputs.loading import load_model
from plphp.methods.registry import get_method, method_for
from plphp.policy.bank import bank_file

from .answering import decode_sample, generate_samples
from .controls import smaller_inputs
from .conversation import prompt_inputs
from .datasets import METADATA
from .identity import identity
from .scoring import Outcome, label_free, verify
from .settings import AnyTask, EvalSettings, mode_of, resolve_tasks, task_size
from .skipping import Maker, first_usable, makers_of, records_of
from .store import FORMAT, Store, write_json
from .summary import none_scored, summarize
from .tasks import Task
from .variants import Variant, make_variants
from .workers import run_workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .tasks import Sample

log = logging.getLogger("plphp")

Blocks = dict[str, list[range]]
"""By the name of the task, the numbers of the samples that are scored together."""
Progress = Callable[[str, int, int], None]
"""Told the task of a finished sample, how many samples are done, and how many there are."""
LABEL_FREE_TOKENS = 128


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
    `plphp.evaluation.skipping`; it is not tried again when the run goes on.

    Parameters
    ----------
    settings : EvalSettings
        What to do.
    out : str or Path
        Folder; see `plphp.evaluation.store`.
    workers : int
        Processes over which the samples are spread, each with the model and one thread. The numbers are the same.
    baseline : str, optional
        Label of the method from which the others' differences are given, beside those from ``full``.
    progress : callable
        Told what is done.

    Returns
    -------
    dict
        The figures, as written to ``metrics.json``; see `plphp.evaluation.summary.summarize`.

    Raises
    ------
    ConfigError
        If a method, task or setting is not known, or the folder holds another evaluation.
    LoadError
        If the model or the data cannot be read, or all samples of a task had to be skipped: the others' results are
        written then.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers must be an integer of at least 1, got {workers!r}.")
    # Everything that can be wrong with the settings comes before the weights, which may take minutes.
    tasks = resolve_tasks(settings)
    modes = {task.name: mode_of(task, settings.mode) for task in tasks}
    variants = make_variants(settings.methods, settings.retention)
    labels = {variant.label for variant in variants}
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"The baseline {baseline!r} is not among the methods.{did_you_mean(baseline, labels)}")
    model, processor = load_model(settings.model, settings.dtype, settings.device)
    sample = first_usable(tasks, settings, processor)
    usable, refused = _usable(model, processor, variants, modes.values(), sample)
    config = _config(settings, usable, refused, tasks, modes, identity(model))
    store = Store(out, config)
    todo, done, total = _todo(store, tasks, settings, modes)

    def note(task: str, record: Mapping[str, Any]) -> None:
        nonlocal done
        store.add(task, record)
        if "skipped" in record:
            name = record["index"] if record["id"] is None else record["id"]
            log.warning("%s: sample %s is skipped: %s", task, name, record["skipped"])
        done += 1
        progress(task, done, total)

    if todo and workers > 1:
        del model
        run_workers(_worker_results, (settings, [variant.name for variant in usable]), _shares(todo, workers), note)
    elif todo:
        for task, record in _results(model, processor, settings, usable, todo):
            note(task, record)
    metrics = summarize(store.folder, baseline)
    write_json(store.folder / "metrics.json", metrics)
    without = [name for name in metrics["skipped"] if name not in metrics["tasks"]]
    if without:
        raise LoadError(none_scored(without[0], metrics["skipped"][without[0]]))
    return metrics


def _results(
    model: PreTrainedModel, processor: Any, settings: EvalSettings, variants: Sequence[Variant], todo: Blocks
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Score the samples that are to be done, and yield a record for each."""
    for task in resolve_tasks(settings):
        blocks = todo.get(task.name, [])
        wanted = {number: block for block in blocks for number in block}
        if not wanted:
            continue
        score = functools.partial(_scored, model, processor, settings, variants, task)
        held: list[tuple[int, Maker]] = []
        for number, make in makers_of(task, settings):
            if number not in wanted:
                continue
            held.append((number, make))
            if number == wanted[number][-1]:
                yield from ((task.name, record) for record in records_of(task.name, held, score))
                held = []


def _scored(
    model: PreTrainedModel,
    processor: Any,
    settings: EvalSettings,
    variants: Sequence[Variant],
    task: AnyTask,
    samples: Sequence[Sample],
) -> list[dict[str, Outcome]]:
    mode, rows, limit = mode_of(task, settings.mode), settings.rows, settings.max_new_tokens
    if mode == "generate":
        return generate_samples(model, processor, samples, variants, task.metric, max_new_tokens=limit)
    [sample] = samples
    if mode == "label-free":
        longest = limit or LABEL_FREE_TOKENS
        return [label_free(model, processor, sample, variants, rows=rows, max_new_tokens=longest)]
    if mode == "verify":
        return [verify(model, processor, sample, variants, rows=rows)]
    return [decode_sample(model, processor, sample, variants, task.metric, rows=rows, max_new_tokens=limit)]


def _worker_results(settings: EvalSettings, names: Sequence[str], todo: Blocks) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same in a process of its own, which loads the model itself."""
    model, processor = load_model(settings.model, settings.dtype, settings.device)
    variants = [variant for variant in make_variants(settings.methods, settings.retention) if variant.name in names]
    return _results(model, processor, settings, variants, todo)


def _usable(
    model: PreTrainedModel, processor: Any, variants: Sequence[Variant], modes: Collection[str], sample: Sample
) -> tuple[list[Variant], dict[str, str]]:
    """Leave out the variants that this model cannot do; with the reasons by their names."""
    refused: dict[str, str] = {}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    for variant in variants:
        try:
            method = method_for(variant.config, layers)
            if "generate" in modes:
                refuse_unanswered(method)
            if variant.images == "smaller":
                smaller_inputs(model, processor, sample, variant.retention or 1.0)
            if method.stage is not None:
                # What keeps a method from acting inside prefill is in the model's layers and its attention.
                PrunedCache.for_inputs(model, prompt_inputs(processor, sample), variant.config)
        except (ConfigError, UnsupportedFeatureError, UnsupportedModelError) as error:
            log.warning("%s is left out: %s", variant.name, error)
            refused[variant.name] = str(error)
    return [variant for variant in variants if variant.name not in refused], refused


def _config(
    settings: EvalSettings,
    variants: Sequence[Variant],
    refused: Mapping[str, str],
    tasks: Sequence[AnyTask],
    modes: Mapping[str, str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    attributes = ("name", "group", "metric", "summary", "chance", "scored")
    return {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "variants": [
            {
                "name": one.name,
                "label": one.label,
                "retention": one.retention,
                "images": one.images,
                "config": one.config.to_dict(),
            }
            for one in variants
        ],
        "query_banks": _query_banks(variants),
        "contents": _contents(settings, tasks),
        "refused": dict(refused),
        "tasks": [{**{name: getattr(task, name) for name in attributes}, "mode": modes[task.name]} for task in tasks],
        **about,
    }


def _query_banks(variants: Sequence[Variant]) -> dict[str, str]:
    """SHA-256 of the query banks that methods rank by: one that was made again makes another evaluation."""
    named = {get_method(one.config.method).evidence(one.config).bank for one in variants}
    files = {name: bank_file(name) for name in sorted(filter(None, named))}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def _contents(settings: EvalSettings, tasks: Sequence[AnyTask]) -> dict[str, str]:
    """SHA-256 of what is asked: of the user's own files, without the images that they name, and of the first texts of
    tasks that the code draws. Where they change, it is another evaluation."""
    names = [*(source.partition(":")[0] for source in settings.data), *filter(None, [settings.prompts])]
    files = [Path(name) / METADATA if Path(name).is_dir() else Path(name) for name in names]
    found = {str(file): file.read_bytes() for file in files if file.is_file()}
    for task in tasks:
        if isinstance(task, Task):
            samples = task.samples(settings.split, 3, settings.seed)
            found[task.name] = repr([(one.id, one.system, one.turns) for one in samples]).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def _todo(
    store: Store, tasks: Sequence[AnyTask], settings: EvalSettings, modes: Mapping[str, str]
) -> tuple[Blocks, int, int]:
    """Blocks with a sample that is not done, how many samples are done, and how many there are.

    Blocks do not depend on what is done, so that a batch is padded alike whenever it is run; one that was
    cut off is done again.
    """
    todo: Blocks = {}
    finished = total = 0
    for task in tasks:
        size, step = task_size(task, settings.samples), settings.batch if modes[task.name] == "generate" else 1
        done = store.finished(task.name)
        blocks = [range(start, min(start + step, size)) for start in range(0, size, step)]
        todo[task.name] = [block for block in blocks if not done.issuperset(block)]
        finished += size - sum(len(block) for block in todo[task.name])
        total += size
    return {task: blocks for task, blocks in todo.items() if blocks}, finished, total


def _shares(todo: Blocks, workers: int) -> list[Blocks]:
    """Deal the blocks out, task by task."""
    shares = [{task: blocks[worker::workers] for task, blocks in todo.items()} for worker in range(workers)]
    return [share for share in shares if any(share.values())]
