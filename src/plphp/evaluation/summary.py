# SPDX-License-Identifier: Apache-2.0
"""From finished samples to figures: means with intervals per task and per group, and what to keep of a run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, LoadError, did_you_mean
from .intervals import LEVEL, RESAMPLES, Resampled, averaged, resample
from .settings import EvalSettings
from .store import FORMAT, read_config, read_json, read_records, write_json
from .tasks import available_tasks
from .variants import FULL

MEASURES = ("kept", "agreement", "kl", "right_share")
"""Beside the score, given as plain means."""
PER_TASK = ("score", "kept")
"""What compact results hold of each task; of groups they hold everything."""


def summarize(
    folder: str | Path, baseline: str | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Work out the figures of an evaluation, finished or not.

    Parameters
    ----------
    folder : str or Path
        Of an evaluation.
    baseline : str, optional
        Label of the method from which differences are given, at the same retention, beside those from ``full``.
    seed : int
        Of the bootstrap.
    resamples : int
        Of the bootstrap.

    Returns
    -------
    dict
        JSON-ready. ``tasks`` and ``groups`` hold for every variant: ``score``, ``vs_full`` and ``vs_baseline``
        (mean and 95 % interval of the paired bootstrap over samples; a group is the mean of its scored tasks, each
        with equal weight), and the means ``kept`` (measured vision KV, fraction), ``right_share`` (tokens before
        the first error, fraction), ``agreement`` and ``kl`` (nats). What was not measured is left out.

    Raises
    ------
    LoadError
        If the folder holds no evaluation, or no finished sample.
    ConfigError
        If the baseline is not among the methods.
    """
    folder = Path(folder)
    config = read_config(folder)
    variants = config["variants"]
    labels = [variant["label"] for variant in variants]
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"The baseline {baseline!r} is not among the methods.{did_you_mean(baseline, labels)}")
    against = [_baseline_of(variant, variants, baseline) for variant in variants]
    tasks: dict[str, Any] = {}
    drawn: dict[str, tuple[Resampled | None, dict[str, Any]]] = {}
    for task in config["tasks"]:
        records = read_records(folder, task["name"])
        if not records:
            continue
        scores = _scores(records, variants)
        found = None if scores is None else resample(scores, task["name"], seed=seed, resamples=resamples)
        means = {name: _means(records, variants, name) for name in MEASURES}
        drawn[task["name"]] = (found, means)
        tasks[task["name"]] = {
            **{key: task[key] for key in ("group", "metric", "mode", "chance", "scored")},
            "samples": len(records),
            "variants": _figures(variants, found, means, against),
        }
    if not tasks:
        raise LoadError(f"{folder} holds no finished sample yet.")
    return {
        "format": FORMAT,
        "variants": [{key: one[key] for key in ("name", "label", "retention")} for one in variants],
        "refused": config["refused"],
        "baseline": baseline,
        "resamples": resamples,
        "level": LEVEL,
        "tasks": tasks,
        "groups": _groups(tasks, drawn, variants, against),
    }


def compact_results(folder: str | Path, baseline: str | None = None) -> dict[str, Any]:
    """Figures of an evaluation with where they come from, and nothing per sample: what documents are made from.

    Parameters
    ----------
    folder : str or Path
        Of a finished evaluation.
    baseline : str, optional
        See `summarize`.

    Raises
    ------
    LoadError
        If samples of the built-in tasks are missing.
    """
    config = read_config(Path(folder))
    missing = unfinished(folder)
    if missing:
        raise LoadError(f"{folder} is not finished: {missing}. Run the same command again: it goes on where it was.")
    about = {name: config[name] for name in ("date", "hardware", "versions", "model", "settings")}
    figures = summarize(folder, baseline)
    for task in figures["tasks"].values():
        task["variants"] = {
            name: {measure: one[measure] for measure in PER_TASK if measure in one}
            for name, one in task["variants"].items()
        }
    return {"format": FORMAT, "command": command_of(config["settings"]), **about, **figures}


def unfinished(folder: str | Path) -> str:
    """Say which built-in tasks of an evaluation lack samples, as in "cell: 7 of 40"; empty where none does."""
    config = read_config(Path(folder))
    built_in = {task["name"] for task in config["tasks"]} & set(available_tasks())
    wanted = config["settings"]["samples"]
    done = {name: len(read_records(Path(folder), name)) for name in sorted(built_in)}
    return ", ".join(f"{name}: {count} of {wanted} samples" for name, count in done.items() if count < wanted)


def command_of(settings: Mapping[str, Any]) -> str:
    """The command line that makes an evaluation with these settings; defaults are left out."""
    parts = ["plphp eval"]
    for field in dataclasses.fields(EvalSettings):
        value = settings[field.name]
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        if value == default:
            continue
        if (field.name, value) == ("mode", "label-free"):
            parts.append("--label-free")
        elif field.name == "data":
            parts += [f"--data {shlex.quote(one)}" for one in value]
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(f"--{field.name.replace('_', '-')} {shlex.quote(text)}")
    return " ".join([*parts, "--out DIR"])


def write_results(folder: str | Path, path: str | Path, baseline: str | None = None) -> None:
    """Write `compact_results` to a JSON file.

    Raises
    ------
    ConfigError
        If there is no such folder to write to.
    """
    if not Path(path).parent.is_dir():
        raise ConfigError(f"There is no folder {Path(path).parent} to write the results to.")
    write_json(Path(path), compact_results(folder, baseline))


def read_results(path: str | Path) -> dict[str, Any]:
    """Read what `write_results` wrote."""
    return read_json(Path(path))


def _groups(
    tasks: Mapping[str, Any],
    drawn: Mapping[str, tuple[Resampled | None, dict[str, Any]]],
    variants: Sequence[Mapping[str, Any]],
    against: Sequence[int | None],
) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(task["group"] for task in tasks.values()):
        # what is not scored has a score that survives without the images, or none at all
        members = [name for name, task in tasks.items() if task["group"] == group and task["scored"]]
        members = members or [name for name, task in tasks.items() if task["group"] == group]
        sets = [found for found, _ in map(drawn.__getitem__, members) if found is not None]
        together = averaged(sets) if len(sets) == len(members) else None
        means = {name: _averaged([drawn[member][1][name] for member in members]) for name in MEASURES}
        groups[group] = {
            "tasks": members,
            "samples": sum(tasks[member]["samples"] for member in members),
            "variants": _figures(variants, together, means, against),
        }
    return groups


def _baseline_of(variant: Mapping[str, Any], variants: Sequence[Mapping[str, Any]], label: str | None) -> int | None:
    """Number of the baseline at a variant's retention, or of the one that has no retention."""
    for number, other in enumerate(variants):
        if label is not None and other["label"] == label and other["retention"] in (None, variant["retention"]):
            return number
    return None


def _scores(records: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]]) -> list[list[float]] | None:
    """Scores [samples, variants], or None where none were asked for."""
    rows = [[record["outcomes"][one["name"]].get("score") for one in variants] for record in records]
    return None if any(score is None for row in rows for score in row) else rows


def _means(
    records: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]], measure: str
) -> list[float | None]:
    read = _right_share if measure == "right_share" else lambda outcome: outcome.get(measure)
    means: list[float | None] = []
    for variant in variants:
        values = [read(record["outcomes"][variant["name"]]) for record in records]
        known = [value for value in values if value is not None]
        means.append(float(np.mean(known)) if known else None)
    return means


def _right_share(outcome: Mapping[str, Any]) -> float | None:
    return outcome["right_tokens"] / outcome["tokens"] if outcome.get("tokens") else None


def _averaged(lists: Sequence[Sequence[float | None]]) -> list[float | None]:
    columns = ([value for value in column if value is not None] for column in zip(*lists, strict=True))
    return [float(np.mean(known)) if known else None for known in columns]


def _figures(
    variants: Sequence[Mapping[str, Any]],
    found: Resampled | None,
    means: Mapping[str, Sequence[float | None]],
    against: Sequence[int | None],
) -> dict[str, Any]:
    figures = {}
    full = [variant["name"] for variant in variants].index(FULL)
    for number, variant in enumerate(variants):
        values: dict[str, Any] = {}
        if found is not None:
            values["score"] = found.interval(number).to_dict()
            values["vs_full"] = found.interval(number, full).to_dict()
            base = against[number]
            if base is not None:
                values["vs_baseline"] = found.interval(number, base).to_dict()
        values |= {name: round(mean, 6) for name in MEASURES if (mean := means[name][number]) is not None}
        figures[variant["name"]] = values
    return figures
