# SPDX-License-Identifier: Apache-2.0
"""What the page of tables says of the stages before the cache: ``early.json``, ``chains.json``, ``important.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]

ALONE = "query_bank@0.25"
"""A method of the KV cache alone: prefill computes every token."""
CHAINS = ("DivPrune 50 %, then query_bank@0.5", "DPP 50 %, then query_bank@0.5")
"""Half of the vision tokens before the text model, of theirs a half in the KV cache: a quarter, as `ALONE` holds."""
IMPORTANT = ("ZipVL@0.5", "ZipVL@0.25", "ZipVL, the rest in 2 bits@0.25")
"""Attention alone is among fewer tokens."""
COMPUTED = {**dict.fromkeys(("full", ALONE, *IMPORTANT), 1.0), **dict.fromkeys(CHAINS, 0.5)}
"""The vision tokens x layers that prefill computes where that is not the share of the KV that is held."""
WITHIN = 3
"""Points by which half of the tokens and then a quarter of the KV were to be below that quarter alone at most."""
AIMED = ("DivPrune 50 %, then query_bank@0.5", "DivPrune, Euclidean 50 %, then query_bank@0.5")
"""The chains of ``chains.json``: by the paper's distance, and by ours."""


def stages_section(results: Mapping[str, Any]) -> str:
    """The section of the page of tables."""
    settings = results["settings"]
    about = textwrap.fill(
        "Vision tokens that leave before the text model or inside prefill (`python benchmarks/quality.py early "
        f"--samples {settings['samples']}`): {settings['samples']} samples a task, split `{settings['split']}`, "
        f"{results['date']}. *Computed* is the share of the vision tokens x layers that prefill computes, *held* the "
        "measured vision KV. `random`, `pool` (means of neighbours) and `downsample` (smaller images) are the controls "
        "that a choice has to beat. FastV's figures are means over the layers. Differences are from the full cache, in "
        "points, with paired 95 % intervals; the mean is over the groups.",
        118,
    )
    return f"\n## Before and inside the text model\n\n{about}\n\n{_table(results)}\n"


def important_section(results: Mapping[str, Any]) -> str:
    """The section of the page of tables on attention among important tokens."""
    settings = results["settings"]
    about = textwrap.fill(
        "Each layer computes all vision tokens, and attention of prefill is among the share of them that is held "
        f"(`python benchmarks/quality.py important --samples {settings['samples']}`): {settings['samples']} samples a "
        f"task, split `{settings['split']}`, {results['date']}. Of the second line the rest is held in 2 bits "
        "(`unimportant=kivi2`) and attends to nothing in prefill. Differences as above.",
        118,
    )
    return f"\n### Attention among important tokens\n\n{about}\n\n{_table(results)}\n"


def _table(results: Mapping[str, Any]) -> str:
    groups = results["groups"]
    lines = [
        f"| | computed % | held % | mean difference | {' | '.join(group.replace('_', ' ') for group in groups)} |",
        f"|---|---|---|---|{'---|' * len(groups)}",
        *(_line(results, variant) for variant in results["variants"]),
    ]
    return "\n".join(lines)


def chains_section(results: Mapping[str, Any]) -> str:
    """The section of the page of tables on chains, with more samples."""
    settings = results["settings"]
    about = textwrap.fill(
        "With half of the vision tokens before the text model and a quarter of the KV in all, beside that quarter "
        f"alone (`python benchmarks/quality.py chains --samples {settings['samples']}`): {settings['samples']} samples "
        f"a task, split `{settings['split']}`, {results['date']}. *Euclidean* is `divprune:distance=euclidean`. "
        "Differences are from `query_bank` alone, in points, with paired 95 % intervals.",
        118,
    )
    groups = {name.replace("_", " "): group["variants"] for name, group in results["groups"].items()}
    parts = {"all": results["overall"]["variants"], **groups}
    lines = [f"| | held % | {' | '.join(parts)} |", f"|---|---|{'---|' * len(parts)}"]
    for variant in results["variants"]:
        name = variant["name"]
        own = [part[name] for part in parts.values()]
        cells = (_from_baseline(values) for values in own)
        lines.append(f"| {_label(variant)} | {100 * own[0]['kept']:.1f} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"\n### Half of the tokens, then a quarter of the KV\n\n{about}\n\n{table}\n\n{_aimed_at(groups)}"


def _label(variant: Mapping[str, Any]) -> str:
    alone = variant["retention"] is None or "then" in variant["label"]
    return str(variant["label"]) if alone else f"{variant['label']}, {100 * variant['retention']:.0f} %"


def _from_baseline(values: Figures) -> str:
    score = f"{100 * values['score']['mean']:.1f}"
    compared = {0.0} != {values["vs_baseline"][end] for end in ("low", "high")}  # a line with itself
    return f"{score}, {_points(values['vs_baseline'])}" if compared else score


def _line(results: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    name, own = variant["name"], results["overall"]["variants"][variant["name"]]
    scores = (f"{100 * group['variants'][name]['score']['mean']:.1f}" for group in results["groups"].values())
    difference = "" if name == "full" else _points(own["vs_full"])
    cells = (f"{100 * COMPUTED.get(name, own['kept']):.0f}", f"{100 * own['kept']:.1f}", difference, *scores)
    return f"| {variant['label']} | {' | '.join(cells)} |"


def _aimed_at(groups: Mapping[str, Figures]) -> str:
    """How far the chains are from the method of the KV cache alone."""
    said = []
    for chain in AIMED:
        points = {group: 100 * variants[chain]["vs_baseline"]["mean"] for group, variants in groups.items()}
        verdict = "met" if min(points.values()) >= -WITHIN else "**missed**"
        said.append("; ".join(f"{group} {own:+.1f}" for group, own in points.items()) + f": {verdict}.")
    text = (
        f"Aimed at: DivPrune at 50 % and then `query_bank`, at a quarter of the KV, at most {WITHIN} points below "
        f"`query_bank` alone in every group, with half of the tokens computed. Measured, by cosine distance as in the "
        f"paper: {said[0]} By Euclidean distance: {said[1]}"
    )
    return textwrap.fill(text, 118) + "\n"


def _points(interval: Figures) -> str:
    return f"{100 * interval['mean']:+.1f} ({100 * interval['low']:+.1f}, {100 * interval['high']:+.1f})"
