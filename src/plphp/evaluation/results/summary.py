# SPDX-License-Identifier: Apache-2.0
"""From finished samples to figures: means with intervals per task, per group, and over all groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plphp.errors import ConfigError, LoadError, did_you_mean
from plphp.evaluation.settings import FULL

from .intervals import LEVEL, RESAMPLES, Resampled, averaged, resample
from .store import FORMAT, read_config, read_records, read_skipped

MEASURES = ("kept", "vision_kept", "read", "agreement", "kl", "right_share")
"""Beside the score; their figures are plain means."""
MEASURED_LATER = ("vision_kept", "read")
"""Those that records of earlier versions lack."""
Records = Sequence[Mapping[str, Any]]
"""Scored samples of a task, as the store holds them."""


@dataclass(frozen=True)
class _Variants:
    """The variants of a run, and with which baseline each is compared.

    Parameters
    ----------
    listed : sequence of mapping
        As the configuration of the run has them.
    baselines : sequence of int or None
        For each variant the number of its baseline among them.
    """

    listed: Sequence[Mapping[str, Any]]
    baselines: Sequence[int | None]

    @property
    def names(self) -> list[str]:
        return [variant["name"] for variant in self.listed]


@dataclass(frozen=True)
class _Measured:
    """What a set of samples says of every variant.

    Parameters
    ----------
    scores : Resampled, optional
        None where no answers were scored.
    means : mapping
        By the name of the measure, a mean for each variant; None where a variant has none.
    """

    scores: Resampled | None
    means: Mapping[str, Sequence[float | None]]


def summarize(
    folder: str | Path, baseline: str | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Work out the figures of an evaluation, finished or not.

    Parameters
    ----------
    folder : str or Path
        Folder of an evaluation.
    baseline : str, optional
        Label of the method from which differences are given, at the same retention, beside those from ``full``.
    seed : int
        Seed of the bootstrap.
    resamples : int
        Draws of the bootstrap.

    Returns
    -------
    dict
        JSON-ready. ``tasks``, ``groups`` and ``overall`` hold for every variant ``score``, ``vs_full`` and
        ``vs_baseline`` (mean and 95 % interval of the paired bootstrap over samples), and the means ``kept`` (bytes
        held of the vision KV, fraction), ``read`` (bytes that a decoding step reads of it, fraction), ``vision_kept``
        (vision entries, where bytes do not say the same), ``right_share`` (tokens before the first error, fraction),
        ``agreement`` and ``kl`` (nats); what was not measured is left out. A group is the mean of its scored tasks, and
        ``overall`` the mean of the groups that have any, each with equal weight whatever the number of its samples.
        ``skipped`` holds by task the samples that no method was scored on, with the reasons.

    Raises
    ------
    LoadError
        If the folder holds no evaluation, or no finished sample.
    ConfigError
        If the baseline is not among the methods.
    """
    folder = Path(folder)
    config = read_config(folder)
    variants = _variants(config["variants"], baseline)
    tasks: dict[str, Any] = {}
    measured: dict[str, _Measured] = {}
    skipped: dict[str, Records] = {}
    for task in config["tasks"]:  # task by task: all samples together may not fit in memory
        name = task["name"]
        records, left_out = read_records(folder, name), read_skipped(folder, name)
        if left_out:
            skipped[name] = left_out
        if records:
            measured[name] = _measured(records, variants, name, seed, resamples)
            tasks[name] = _task_figures(task, len(records), len(left_out), _figures(variants, measured[name]))
    _check_any(tasks, skipped, folder)
    groups, overall = _groups(tasks, measured, variants)
    about = {"format": FORMAT, "variants": [_shown(variant) for variant in variants.listed]}
    about |= {"refused": config["refused"], "skipped": skipped, "baseline": baseline}
    about |= {"resamples": resamples, "level": LEVEL}
    return {**about, "tasks": tasks, "groups": groups, "overall": overall}


def _check_any(tasks: Mapping[str, Any], skipped: Mapping[str, Records], folder: Path) -> None:
    if not tasks:
        reasons = [none_scored(name, samples) for name, samples in skipped.items()]
        raise LoadError(reasons[0] if reasons else f"{folder} holds no finished sample yet.")


def _shown(variant: Mapping[str, Any]) -> dict[str, Any]:
    return {key: variant[key] for key in ("name", "label", "retention")}


def none_scored(task: str, skipped: Records) -> str:
    """Say that a task has no scored sample, with the reason against the first."""
    first = skipped[0]
    name = first["index"] if first["id"] is None else first["id"]
    return (
        f"No sample of the task {task!r} could be scored, {len(skipped)} had to be skipped; the first, {name}: "
        f"{first['reason']}"
    )


def check_baseline(baseline: str | None, labels: Sequence[str]) -> None:
    """Refuse a baseline that is not among the labels of the methods.

    Raises
    ------
    ConfigError
        If it is not.
    """
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"The baseline {baseline!r} is not among the methods.{did_you_mean(baseline, labels)}")


def _variants(listed: Sequence[Mapping[str, Any]], baseline: str | None) -> _Variants:
    check_baseline(baseline, [variant["label"] for variant in listed])
    return _Variants(listed, [_baseline_of(variant, listed, baseline) for variant in listed])


def _baseline_of(variant: Mapping[str, Any], variants: Sequence[Mapping[str, Any]], label: str | None) -> int | None:
    """Number of the baseline that has the variant's retention, or none at all."""
    for number, candidate in enumerate(variants):
        if label is not None and candidate["label"] == label and candidate["retention"] in (None, variant["retention"]):
            return number
    return None


def _task_figures(task: Mapping[str, Any], samples: int, skipped: int, variants: dict[str, Any]) -> dict[str, Any]:
    about = {key: task[key] for key in ("group", "metric", "mode", "chance", "scored")}
    return {**about, "samples": samples, "skipped": skipped, "variants": variants}


def _measured(records: Records, variants: _Variants, task: str, seed: int, resamples: int) -> _Measured:
    scores = _scores(records, variants)
    drawn = None if scores is None else resample(scores, task, seed=seed, resamples=resamples)
    return _Measured(drawn, {measure: _means(records, variants, measure) for measure in MEASURES})


def _scores(records: Records, variants: _Variants) -> list[list[float]] | None:
    """Scores [samples, variants], or None where no answer was scored."""
    rows = [[record["outcomes"][name].get("score") for name in variants.names] for record in records]
    return None if any(score is None for row in rows for score in row) else rows


def _means(records: Records, variants: _Variants, measure: str) -> list[float | None]:
    columns = {name: [_value(record["outcomes"][name], measure) for record in records] for name in variants.names}
    if measure in MEASURED_LATER:  # samples of an earlier version do not say it, and a mean of the others would mislead
        columns = {name: [] if None in column else column for name, column in columns.items()}
    return [_mean(column) for column in columns.values()]


def _value(outcome: Mapping[str, Any], measure: str) -> float | None:
    if measure == "right_share":
        return outcome["right_tokens"] / outcome["tokens"] if outcome.get("tokens") else None
    return outcome.get(measure)


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that were measured; None where none was."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _groups(
    tasks: Mapping[str, Any], measured: Mapping[str, _Measured], variants: _Variants
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of each group, and those over all groups."""
    groups: dict[str, Any] = {}
    pooled: dict[str, _Measured] = {}
    for group in dict.fromkeys(task["group"] for task in tasks.values()):
        members = _counting([name for name, task in tasks.items() if task["group"] == group], tasks)
        pooled[group] = _pooled([measured[member] for member in members])
        groups[group] = {"tasks": members, **_totals(members, tasks), "variants": _figures(variants, pooled[group])}
    scored = {group for group, values in groups.items() if any(tasks[name]["scored"] for name in values["tasks"])}
    counting = [group for group in groups if group in scored or not scored]
    members = [name for group in counting for name in groups[group]["tasks"]]
    figures = _figures(variants, _pooled([pooled[group] for group in counting]))
    return groups, {"groups": counting, **_totals(members, tasks), "variants": figures}


def _counting(names: Sequence[str], tasks: Mapping[str, Any]) -> list[str]:
    """The tasks that count in the mean of their group: those that are scored, or all where none is."""
    return [name for name in names if tasks[name]["scored"]] or list(names)


def _totals(members: Sequence[str], tasks: Mapping[str, Any]) -> dict[str, int]:
    return {count: sum(tasks[member][count] for member in members) for count in ("samples", "skipped")}


def _pooled(parts: Sequence[_Measured]) -> _Measured:
    """Mean over tasks or groups, each with equal weight and resampled by itself; scored if all of them are."""
    scores = [part.scores for part in parts if part.scores is not None]
    columns = {measure: zip(*(part.means[measure] for part in parts), strict=True) for measure in MEASURES}
    return _Measured(
        averaged(scores) if len(scores) == len(parts) else None,
        {measure: [_mean(values) for values in column] for measure, column in columns.items()},
    )


def _figures(variants: _Variants, measured: _Measured) -> dict[str, Any]:
    """What is said of each variant, by its name."""
    figures, full = {}, variants.names.index(FULL)
    for number, name in enumerate(variants.names):
        values: dict[str, Any] = {}
        if measured.scores is not None:
            values["score"] = measured.scores.interval(number).to_dict()
            values["vs_full"] = measured.scores.interval(number, full).to_dict()
            baseline = variants.baselines[number]
            if baseline is not None:
                values["vs_baseline"] = measured.scores.interval(number, baseline).to_dict()
        means = {measure: measured.means[measure][number] for measure in MEASURES}
        if means["vision_kept"] is not None and math.isclose(means["vision_kept"], means["kept"] or 0.0, abs_tol=1e-6):
            means["vision_kept"] = None  # all text is kept, and entries are whole: the bytes held say it all
        values |= {measure: round(mean, 6) for measure, mean in means.items() if mean is not None}
        figures[name] = values
    return figures
