# SPDX-License-Identifier: Apache-2.0
"""What the page of tables says of conversations under a budget, from ``memory.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

ASKED = {"newest_image": "the newest image", "old_image": "an old image", "two_images": "two images"}
"""Tasks of the group, with what each asks about."""


def memory_section(results: Mapping[str, Any]) -> str:
    """The section of the page of tables."""
    settings = results["settings"]
    about = textwrap.fill(
        "Conversations in which 2 to 12 images arrive over the turns (`python benchmarks/quality.py memory`), by the "
        f"rules of fading under a `vision_budget`: {settings['samples']} conversations a column, split "
        f"`{settings['split']}`, {results['date']}. A budget is a share of what the full cache holds after the last "
        "turn; *held* is the most that is held after any turn. `no budget` is the method alone, which evicts from each "
        f"image as it comes. Scores in per cent, differences from `{results['baseline']}` at the same share in points; "
        "paired 95 % intervals.",
        118,
    )
    lines = [f"| | held % | {' | '.join(ASKED.values())} | mean difference |", f"|---|---|{'---|' * len(ASKED)}---|"]
    lines += [_line(results, variant) for variant in results["variants"]]
    return f"\n## A conversation with a budget\n\n{about}\n\n" + "\n".join(lines) + "\n"


def _line(results: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    name, tasks = variant["name"], results["tasks"]
    own = results["overall"]["variants"][name]
    scores = (_interval(tasks[task]["variants"][name]["score"], "") for task in ASKED)
    compared = "vs_baseline" in own and variant["label"] != results["baseline"]
    difference = _interval(own["vs_baseline"], "+") if compared else ""
    share = "" if variant["retention"] is None else f", {100 * variant['retention']:g} %"
    return f"| {variant['label']}{share} | {100 * own['kept']:.1f} | {' | '.join(scores)} | {difference} |"


def _interval(figures: Mapping[str, float], sign: str) -> str:
    mean, low, high = (100 * figures[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} ({low:{sign}.1f}, {high:{sign}.1f})"
