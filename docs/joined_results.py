# SPDX-License-Identifier: Apache-2.0
"""Two runs over the same samples of the same weights, read as one: what both hold has to score the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAME = ("split", "seed", "samples", "tasks")
"""Settings that say which samples a run is over."""
MOST_APART = {"groups": 0.01, "tasks": 0.03}
"""Most that the score of a line may differ between the runs: another processor rounds otherwise, and answers turn."""
RENAMED = {"query_bank": "query_bank_equal"}
"""Labels of the earlier run that mean something else in the later one, by what they are called there."""


def joined(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Add the variants of a later run to those of an earlier one.

    Parameters
    ----------
    earlier, later : mapping
        Figures as ``plphp eval --results`` writes them, with the same baseline.

    Returns
    -------
    dict
        The earlier results with the lines of both, the later ones first, and ``apart``: by ``groups`` and ``tasks``
        the most that the score of a line differs between the runs where both hold it; the later one is taken.
        Everything else is the earlier run's.

    Raises
    ------
    SystemExit
        If the runs are over other samples or weights, or a line that both hold differs by more than `MOST_APART`.
    """
    for name in SAME:
        if earlier["settings"][name] != later["settings"][name]:
            raise SystemExit(f"The runs cannot be joined: they differ in {name}.")
    if earlier["model"]["sha256"] != later["model"]["sha256"] or earlier["baseline"] != later["baseline"]:
        raise SystemExit("The runs cannot be joined: they are of other weights, or have other baselines.")
    earlier = _renamed(earlier)
    both = {variant["name"] for variant in earlier["variants"]} & {variant["name"] for variant in later["variants"]}
    apart = dict.fromkeys(MOST_APART, 0.0)
    for part, most in MOST_APART.items():
        for name in earlier[part]:
            for variant in both:
                before, now = (run[part][name]["variants"][variant]["score"]["mean"] for run in (earlier, later))
                apart[part] = max(apart[part], abs(before - now))
                if abs(before - now) > most:
                    raise SystemExit(f"The runs cannot be joined: {variant} scores {before} and {now} on {name}.")
    earlier.pop("overall", None)  # of the earlier lines alone
    variants = [*later["variants"], *(variant for variant in earlier["variants"] if variant["name"] not in both)]
    return {
        **earlier,
        "variants": variants,
        "apart": apart,
        "refused": {**earlier["refused"], **later["refused"]},
        **{part: _with_both(earlier[part], later[part]) for part in ("tasks", "groups")},
    }


def _with_both(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {**values, "variants": {**values["variants"], **later[name]["variants"]}}
        for name, values in earlier.items()
    }


def _renamed(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the lines of `RENAMED` under their new labels."""

    def name(old: str) -> str:
        label, at, rate = old.partition("@")
        return f"{RENAMED.get(label, label)}{at}{rate}"

    def figures(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: {**values, "variants": {name(old): own for old, own in values["variants"].items()}}
            for key, values in parts.items()
        }

    variants = [
        {**variant, "name": name(variant["name"]), "label": RENAMED.get(variant["label"], variant["label"])}
        for variant in results["variants"]
    ]
    return {**results, "variants": variants, "tasks": figures(results["tasks"]), "groups": figures(results["groups"])}
