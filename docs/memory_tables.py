# SPDX-License-Identifier: Apache-2.0
"""What the page of tables says of conversations under a budget, from ``memory.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

ASKED = {"newest_image": "the newest image", "old_image": "an old image", "two_images": "two images"}
"""Tasks of the group, with what each asks about."""
RULES = ("oldest", "newest", "equal")
"""The rules to compare with."""


def memory_section(results: Mapping[str, Any]) -> str:
    """The section of the page of tables."""
    settings = results["settings"]
    about = textwrap.fill(
        "Conversations in which 2 to 12 images arrive over the turns (`python benchmarks/quality.py memory --samples "
        f"{settings['samples']}`), by the rules of fading under a `vision_budget`: {settings['samples']} a column, "
        f"split `{settings['split']}`, {results['date']}. A budget is a share of what the full cache holds after the "
        "last turn; *held* is the most that is held after any turn. `no budget` is the method alone, which evicts from "
        f"each image as it comes. Scores in per cent, differences from `{results['baseline']}` at the same share in "
        "points; paired 95 % intervals.",
        118,
    )
    lines = [f"| | held % | {' | '.join(ASKED.values())} | mean difference |", f"|---|---|{'---|' * len(ASKED)}---|"]
    lines += [_line(results, variant) for variant in results["variants"]]
    table = "\n".join(lines)
    return f"\n## A conversation with a budget\n\n{about}\n\n{table}\n\n{_aimed_at(results)}"


def _aimed_at(results: Mapping[str, Any]) -> str:
    """What was to be reached by the rule ``ranked``, and what was."""
    overall = {name: own["score"]["mean"] for name, own in results["overall"]["variants"].items()}
    shares = sorted({own["retention"] for own in results["variants"] if own["retention"] is not None}, reverse=True)

    def lead(share: float) -> float:
        others = [overall[f"{rule}@{share:g}"] for rule in RULES]
        return round(100 * (overall[f"ranked@{share:g}"] - max(others)), 6)

    def apart(task: str, rule: str, share: float) -> float:
        scores = (results["tasks"][task]["variants"][f"{name}@{share:g}"]["score"]["mean"] for name in ("ranked", rule))
        return round(100 * float(next(scores) - next(scores)), 6)

    ahead = [lead(share) for share in shares]
    old = apart("old_image", "oldest", 0.1)
    newest = [apart("newest_image", "newest", share) for share in shares]
    text = (
        "Aimed at: `ranked` above every other rule in the mean at each budget. Measured, from the best of the others: "
        f"{_listed(ahead, shares)}: {_verdict(min(ahead) > 0)}. Old images at 10 % at least 20 points above `oldest`: "
        f"{old:+.1f}, {_verdict(old >= 20)}. The newest image at most 5 points below `newest`: "
        f"{_listed(newest, shares)}, {_verdict(min(newest) >= -5)}."
    )
    return textwrap.fill(text, 118) + "\n"


def _listed(points: Sequence[float], shares: Sequence[float]) -> str:
    return ", ".join(f"{own:+.1f} at {100 * share:g} %" for own, share in zip(points, shares, strict=True))


def _verdict(reached: bool) -> str:
    return "met" if reached else "**missed**"


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
