# SPDX-License-Identifier: Apache-2.0
"""What the pages on quality say of few bits, from ``tiers.json``, ``bits.json`` and ``ladders.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]

BITS = {
    "c3": "every entry in 3 bits, no choice, nothing measured on the model",
    "kivi2": "every entry in KIVI's 2 bits",
}
"""Labels of the run with everything in one rung that the first page shows, with what they are."""
RECIPES = {
    "t10": "a bank and its codebooks: ladder `t10`",
    "t7.5": "the same, `t7.5`",
    "t5": "the same, `t5`",
    "t10_read20": "`t10`, of which a step reads a fifth of the entries",
    "r15": "a bank without codebooks: `query_bank`, `r15`",
    "p12.5": "codebooks without a bank: `prompt_queries`, `p12.5`",
    "r20": "neither: `prompt_queries`, `r20`",
}
"""Labels of the run with ladders, with what they are."""
WHOLE = {"query_bank": "whole entries by the same bank", "random1": "whole entries at random"}
"""Lines at two rates, which hold entries whole or not at all."""
AIMS: dict[str, dict[str, float]] = {
    "t10": {"held": 10.2, "mean": -0.8, "group": -2, "kl": 1.5},
    "t7.5": {"held": 7.6, "mean": -1.5, "group": -3, "kl": 3},
    "t5": {"held": 5.1, "mean": -2.5, "group": -4},
    "t10_read20": {"read": 5, "mean": -1.3, "group": -3},
    "r15": {"held": 15, "mean": -1.3, "group": -3},
    "p12.5": {"held": 12.5, "mean": -1.5, "group": -3},
    "r20": {"held": 20, "mean": -1.3, "group": -3},
}
BITS_AIMS: dict[str, dict[str, float]] = {"c3": {"held": 21, "mean": -0.5, "group": -1.5, "kl": 0.5}}
"""What was aimed at: most bytes held or read in per cent, least points from the full cache in the mean over the groups
and in any group, most KL in 1e-3 nats."""
OVER_WHOLE = 30
"""Points by which t5 was to be above whole entries of the same bank at 5 %."""


def first_table(results: Mapping[str, Any], bits: Mapping[str, Any]) -> str:
    """Bytes held and read against the score: the table of the first page."""
    return "\n".join([*_head(results), *_lines(BITS, bits), *_ladder_lines(results)]) + "\n"


def _head(results: Mapping[str, Any]) -> list[str]:
    groups = results["groups"]
    return [
        f"| | held % | read % | mean difference from the full cache | {' | '.join(map(_title, groups))} |",
        f"|---|---|---|---|{'---|' * len(groups)}",
        _line("the full cache", results, "full"),
    ]


def _lines(labels: Mapping[str, str], results: Mapping[str, Any]) -> list[str]:
    return [_line(f"`{label}`: {about}", results, label) for label, about in labels.items()]


def _ladder_lines(results: Mapping[str, Any]) -> list[str]:
    lines = _lines(RECIPES, results)
    for label, about in WHOLE.items():
        lines += [_line(f"`{label}`: {about}", results, name) for name in _rates_of(results, label)]
    return lines


def aims_table(results: Mapping[str, Any], all_aims: Mapping[str, Mapping[str, float]]) -> str:
    """What was aimed at, beside what was measured."""
    headings = ("", "held %", "read %", "mean difference", "worst group", "KL x 1e3", "aimed at", "")
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for label, aims in all_aims.items():
        own, worst = results["overall"]["variants"][label], _worst(results, label)
        measured = {
            "held": 100 * own["kept"],
            "read": 100 * own["read"],
            "mean": 100 * own["vs_full"]["mean"],
            "group": worst,
            "kl": 1000 * own["kl"],
        }
        missed = [name for name, aim in aims.items() if not _meets(name, measured[name], aim)]
        asked = ", ".join(f"{name} {aim:g}" for name, aim in aims.items())
        shares = _share(own, "kept"), _share(own, "read")
        cells = (*shares, _points(own["vs_full"]), f"{worst:+.1f}", f"{measured['kl']:.2f}")
        verdict = f"**missed: {', '.join(missed)}**" if missed else "met"
        lines.append(f"| `{label}` | {' | '.join(cells)} | {asked} | {verdict} |")
    return "\n".join(lines) + "\n"


def section(results: Mapping[str, Any]) -> str:
    """The section of the page of tables."""
    settings = results["settings"]
    about = textwrap.fill(
        "Vision entries in few bits in the place of eviction (`python benchmarks/quality.py tiers`): "
        f"{settings['samples']} samples a task, split `{settings['split']}`, {results['date']}. *held* is the bytes of "
        "the vision KV that a prompt leaves, scales and means counted, codebooks not: they belong to the model, and "
        "take 3 MB for this one. *read* is what a decoding step reads of them, measured. Differences are from the full "
        "cache, in points, with paired 95 % intervals; the mean is over the groups.",
        118,
    )
    table = "\n".join([*_head(results), *_ladder_lines(results)])
    aims = aims_table(results, AIMS) + "\n" + _over_whole(results) + _earlier(results)
    return f"\n## Few bits\n\n{about}\n\n{table}\n\n### Few bits: what was aimed at\n\n{aims}"


def _earlier(results: Mapping[str, Any]) -> str:
    """What the run says of a rung that has changed since."""
    own = results["overall"]["variants"].get("c3")
    if own is None:
        return ""
    return (
        "\nThe line `c3` of `tiers.json` is of an earlier `c3`, with keys in groups of 1,024 and rotated values: "
        f"{_share(own, 'kept')} % held, {_points(own['vs_full'])}, KL {1000 * own['kl']:.2f}e-3.\n"
    )


def bits_section(results: Mapping[str, Any]) -> str:
    """The section on everything in one rung, without a choice."""
    settings, own = results["settings"], results["overall"]["variants"]
    about = (
        "\n### Few bits: everything in one rung\n\nNo choice (`python benchmarks/quality.py bits`): "
        f"{settings['samples']} samples a task, split `{settings['split']}`, {results['date']}.\n\n"
    )
    lines = _rung_lines({name: own[name] for name in own if name != "full"})
    return about + "\n".join(lines) + "\n\n" + aims_table(results, BITS_AIMS)


def ladders_section(results: Mapping[str, Any]) -> str:
    """The section on choices, on the development split."""
    settings = results["settings"]
    lines = _rung_lines(results["overall"]["variants"])
    about = (
        f"\n### Few bits: choices\n\nLadders, single rungs for everything, and other evidence: {settings['samples']} "
        f"samples a task, split `{settings['split']}`.\n\n"
    )
    return about + "\n".join(lines) + "\n"


def _rung_lines(variants: Mapping[str, Figures]) -> list[str]:
    lines = ["| | held % | read % | mean difference | KL x 1e3 |", "|---|---|---|---|---|"]
    for name, own in variants.items():
        cells = (_share(own, "kept"), _share(own, "read"), _points(own["vs_full"]), f"{1000 * own['kl']:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _line(about: str, results: Mapping[str, Any], name: str) -> str:
    own = results["overall"]["variants"][name]
    scores = (f"{100 * group['variants'][name]['score']['mean']:.1f}" for group in results["groups"].values())
    difference = "" if name == "full" else _points(own["vs_full"])
    return f"| {about} | {_share(own, 'kept')} | {_share(own, 'read')} | {difference} | {' | '.join(scores)} |"


def _rates_of(results: Mapping[str, Any], label: str) -> list[str]:
    return [variant["name"] for variant in results["variants"] if variant["label"] == label]


def _over_whole(results: Mapping[str, Any]) -> str:
    own, whole = (results["overall"]["variants"][name] for name in ("t5", "query_bank@0.05"))
    gain = 100 * (own["score"]["mean"] - whole["score"]["mean"])
    verdict = "met" if gain >= OVER_WHOLE else "**missed**"
    return (
        f"`t5` is {gain:.1f} points above whole entries of the same bank, which hold {_share(whole, 'kept')} % "
        f"(aimed at: {OVER_WHOLE}; {verdict}).\n"
    )


def _meets(name: str, measured: float, aim: float) -> bool:
    return round(measured, 2) >= aim if name in ("mean", "group") else round(measured, 2) <= aim


def _worst(results: Mapping[str, Any], name: str) -> float:
    return min(100 * group["variants"][name]["vs_full"]["mean"] for group in results["groups"].values())


def _title(group: str) -> str:
    return group.replace("_", " ")


def _share(figures: Figures, measure: str) -> str:
    return f"{100 * figures.get(measure, figures['kept']):.1f}"


def _points(interval: Figures) -> str:
    return f"{100 * interval['mean']:+.1f} ({100 * interval['low']:+.1f}, {100 * interval['high']:+.1f})"
