# SPDX-License-Identifier: Apache-2.0
"""From finished samples to figures: means with intervals per task and per group, and what to keep of a run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plphp.errors import ConfigError, LoadError, did_you_mean

from .intervals import LEVEL, RESAMPLES, Resampled, averaged, resample
from .settings import EvalSettings
from .store import FORMAT, read_config, read_json, read_records, read_skipped, write_json
from .tasks import available_tasks
from .variants import FULL

MEASURES = ("kept", "agreement", "kl", "right_share")
"""Beside the score, given as plain means."""
OPTIONS = {"retention": "target_retention"}
"""Options of ``plphp eval`` that are not named like the setting."""
Drawn = tuple[Resampled | None, dict[str, Any]]
"""Resampled scores, None where there are none, and plain means by the name of the measure."""
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
        JSON-ready. ``tasks``, ``groups`` and ``overall`` hold for every variant: ``score``, ``vs_full`` and
        ``vs_baseline`` (mean and 95 % interval of the paired bootstrap over samples), and the means ``kept``
        (measured vision KV, fraction), ``right_share`` (tokens before the first error, fraction), ``agreement`` and
        ``kl`` (nats). A group is the mean of its scored tasks, and ``overall`` the mean of the groups that have any,
        each with equal weight whatever the number of its samples. What was not measured is left out. ``skipped``
        holds by task the samples that no method was scored on, with the reasons.

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
    skipped: dict[str, list[dict[str, Any]]] = {}
    drawn: dict[str, Drawn] = {}
    for task in config["tasks"]:
        records, left_out = read_records(folder, task["name"]), read_skipped(folder, task["name"])
        if left_out:
            skipped[task["name"]] = left_out
        if not records:
            continue
        scores = _scores(records, variants)
        found = None if scores is None else resample(scores, task["name"], seed=seed, resamples=resamples)
        means = {name: _means(records, variants, name) for name in MEASURES}
        drawn[task["name"]] = (found, means)
        tasks[task["name"]] = {
            **{key: task[key] for key in ("group", "metric", "mode", "chance", "scored")},
            "samples": len(records),
            "skipped": len(left_out),
            "variants": _figures(variants, found, means, against),
        }
    if not tasks:
        none = [none_scored(name, samples) for name, samples in skipped.items()]
        raise LoadError(none[0] if none else f"{folder} holds no finished sample yet.")
    groups, overall = _groups(tasks, drawn, variants, against)
    return {
        "format": FORMAT,
        "variants": [{key: one[key] for key in ("name", "label", "retention")} for one in variants],
        "refused": config["refused"],
        "skipped": skipped,
        "baseline": baseline,
        "resamples": resamples,
        "level": LEVEL,
        "tasks": tasks,
        "groups": groups,
        "overall": overall,
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
    read = (read_records, read_skipped)
    done = {name: sum(len(of(Path(folder), name)) for of in read) for name in sorted(built_in)}
    return ", ".join(f"{name}: {count} of {wanted} samples" for name, count in done.items() if count < wanted)


def none_scored(task: str, skipped: Sequence[Mapping[str, Any]]) -> str:
    """Say that a task has no scored sample, with the reason against the first."""
    first = skipped[0]
    name = first["index"] if first["id"] is None else first["id"]
    return (
        f"No sample of the task {task!r} could be scored, {len(skipped)} had to be skipped; the first, {name}: "
        f"{first['reason']}"
    )


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
            parts.append(f"--{OPTIONS.get(field.name, field.name).replace('_', '-')} {shlex.quote(text)}")
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
    drawn: Mapping[str, Drawn],
    variants: Sequence[Mapping[str, Any]],
    against: Sequence[int | None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of each group, and those over all groups."""
    groups: dict[str, Any] = {}
    pooled: dict[str, Drawn] = {}
    for group in dict.fromkeys(task["group"] for task in tasks.values()):
        members = _that_count([name for name, task in tasks.items() if task["group"] == group], tasks)
        pooled[group] = _pooled([drawn[member] for member in members])
        groups[group] = {"tasks": members, **_counted(members, tasks)}
        groups[group]["variants"] = _figures(variants, *pooled[group], against)
    scored = {group for group, values in groups.items() if any(tasks[name]["scored"] for name in values["tasks"])}
    counting = [group for group in groups if group in scored or not scored]
    overall = {"groups": counting, **_counted([name for group in counting for name in groups[group]["tasks"]], tasks)}
    overall["variants"] = _figures(variants, *_pooled([pooled[group] for group in counting]), against)
    return groups, overall


def _that_count(names: Sequence[str], tasks: Mapping[str, Any]) -> list[str]:
    """The tasks that are scored; all where none is: their score survives without the images, or there is none."""
    return [name for name in names if tasks[name]["scored"]] or list(names)


def _counted(members: Sequence[str], tasks: Mapping[str, Any]) -> dict[str, int]:
    return {count: sum(tasks[member][count] for member in members) for count in ("samples", "skipped")}


def _pooled(parts: Sequence[Drawn]) -> Drawn:
    """Mean over tasks or groups, each with equal weight and resampled by itself; scored if all of them are."""
    sets = [found for found, _ in parts if found is not None]
    together = averaged(sets) if len(sets) == len(parts) else None
    return together, {name: _averaged([means[name] for _, means in parts]) for name in MEASURES}


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
