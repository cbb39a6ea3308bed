# SPDX-License-Identifier: Apache-2.0
"""What the page of tables says of tokens that leave before and inside the text model, from ``early.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]

ALONE = "query_bank@0.25"
"""A method of the KV cache alone: prefill computes every token."""
CHAINS = ("DivPrune 50 %, then query_bank@0.5", "DPP 50 %, then query_bank@0.5")
"""Half of the vision tokens before the text model, of theirs a half in the KV cache: a quarter, as `ALONE` holds."""
COMPUTED = {"full": 1.0, ALONE: 1.0, **dict.fromkeys(CHAINS, 0.5)}
"""The vision tokens x layers that prefill computes where that is not the share of the KV that is held."""
WITHIN = 3
"""Points by which the first of the chains was to be below `ALONE` at most, in every group."""


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
    groups = results["groups"]
    lines = [
        f"| | computed % | held % | mean difference | {' | '.join(group.replace('_', ' ') for group in groups)} |",
        f"|---|---|---|---|{'---|' * len(groups)}",
        *(_line(results, variant) for variant in results["variants"]),
    ]
    table = "\n".join(lines)
    return f"\n## Before and inside the text model\n\n{about}\n\n{table}\n\n{_aimed_at(results)}"


def _line(results: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    name, own = variant["name"], results["overall"]["variants"][variant["name"]]
    scores = (f"{100 * group['variants'][name]['score']['mean']:.1f}" for group in results["groups"].values())
    difference = "" if name == "full" else _points(own["vs_full"])
    cells = (f"{100 * COMPUTED.get(name, own['kept']):.0f}", f"{100 * own['kept']:.1f}", difference, *scores)
    return f"| {variant['label']} | {' | '.join(cells)} |"


def _aimed_at(results: Mapping[str, Any]) -> str:
    """How far the chains are from the method of the KV cache alone, at the same KV and half of the tokens."""
    of_chain = {name: _from_alone(results, name) for name in CHAINS}
    said = ["; ".join(f"{group} {points:+.1f}" for group, points in own.items()) for own in of_chain.values()]
    verdict = "met" if min(of_chain[CHAINS[0]].values()) >= -WITHIN else "**missed**"
    return (
        textwrap.fill(
            f"Aimed at: DivPrune at 50 % and then `query_bank`, at a quarter of the KV, at most {WITHIN} points below "
            f"`query_bank` alone in every group, with half of the tokens computed. Measured: {said[0]}: {verdict}. "
            f"With DPP in its place: {said[1]}. What leaves before the text model is chosen without the question: "
            "where an answer is about several regions, half of the tokens are not enough of them.",
            118,
        )
        + "\n"
    )


def _from_alone(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """Points by group."""
    return {
        group.replace("_", " "): 100 * (values["variants"][name]["score"]["mean"] - _alone(values))
        for group, values in results["groups"].items()
    }


def _alone(values: Figures) -> float:
    return float(values["variants"][ALONE]["score"]["mean"])


def _points(interval: Figures) -> str:
    return f"{100 * interval['mean']:+.1f} ({100 * interval['low']:+.1f}, {100 * interval['high']:+.1f})"
