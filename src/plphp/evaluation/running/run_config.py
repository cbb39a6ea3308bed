# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: everything that its numbers depend on, so that a changed run is not mixed with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plphp.evaluation.results.store import FORMAT
from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.data_lines import METADATA
from plphp.evaluation.tasks.drawn import DrawnTask
from plphp.evaluation.tasks.task import AnyTask
from plphp.methods.registry import chain_of
from plphp.policy.bank import bank_file

from .own_banks import RunBanks
from .variants import Variant

TASK_ATTRIBUTES = ("name", "group", "metric", "summary", "chance", "scored")
SAMPLES_HASHED = 3
"""Samples of a built-in task whose texts stand for all: a change of the drawing code shows in them."""


def run_config(
    settings: EvalSettings,
    variants: Sequence[Variant],
    refused: Mapping[str, str],
    tasks: Sequence[AnyTask],
    modes: Mapping[str, str],
    identity: Mapping[str, Any],
    banks: RunBanks,
) -> dict[str, Any]:
    """Describe a run as JSON-ready values.

    Parameters
    ----------
    settings : EvalSettings
    variants : sequence of Variant
        What is compared, as the settings name it.
    refused : mapping
        By the name of the variants that are left out, the reason.
    tasks : sequence of AnyTask
    modes : mapping
        By the name of the task, how its samples are scored.
    identity : mapping
        See `plphp.evaluation.results.identity.identity`.
    banks : RunBanks
        The query banks that were collected for the run.

    Returns
    -------
    dict
        What `plphp.evaluation.results.store.Store` takes.
    """
    variants = [variant for variant in variants if variant.name not in refused]
    return {
        "format": FORMAT,
        "settings": settings.to_dict(),
        "variants": [
            {
                "name": variant.name,
                "label": variant.label,
                "retention": variant.retention,
                "images": variant.images,
                "config": variant.config.to_dict(),
                **({} if variant.budget_share is None else {"budget_share": variant.budget_share}),
            }
            for variant in variants
        ],
        "query_banks": {**_query_banks(variants), **banks.hashes()},
        "collected_banks": banks.records(),
        "contents": _contents(settings, tasks),
        "refused": dict(refused),
        "tasks": [
            {**{name: getattr(task, name) for name in TASK_ATTRIBUTES}, "mode": modes[task.name]} for task in tasks
        ],
        **identity,
    }


def _query_banks(variants: Sequence[Variant]) -> dict[str, str]:
    """SHA-256 of the query banks that methods rank by, or take codebooks from: a bank that was made again makes another
    evaluation."""
    links = [link for variant in variants for link in chain_of(variant.config).stages.values()]
    named = {link.stage.evidence(link.config).bank for link in links if hasattr(link.stage, "evidence")}
    named |= {link.config.books for link in links}
    files = {name: bank_file(name) for name in sorted(name for name in named if isinstance(name, str) and name)}
    return {name: _hash(file.read_bytes()) for name, file in files.items()}


def _contents(settings: EvalSettings, tasks: Sequence[AnyTask]) -> dict[str, str]:
    """SHA-256 of what is asked.

    Of the user's own files, without the images that they name, and of the first texts of tasks that the code draws.
    """
    names = [*(source.partition(":")[0] for source in settings.data), *filter(None, [settings.prompts])]
    files = [Path(name) / METADATA if Path(name).is_dir() else Path(name) for name in names]
    hashes = {str(file): _hash(file.read_bytes()) for file in files if file.is_file()}
    for task in tasks:
        if isinstance(task, DrawnTask):
            samples = task.samples(settings.split, SAMPLES_HASHED, settings.seed)
            hashes[task.name] = _hash(repr([(sample.id, sample.system, sample.turns) for sample in samples]).encode())
    return hashes


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
