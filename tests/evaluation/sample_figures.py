# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation, written down by hand: for the tests of tables, plots and pages."""

from __future__ import annotations

from typing import Any


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def figures(score: float, kept: float) -> dict[str, Any]:
    values = {"score": interval(score), "vs_full": interval(score - 0.9), "kept": kept, "agreement": 0.75, "kl": 0.125}
    return {**values, "right_share": 0.5}


METRICS = {
    "baseline": None,
    "refused": {},
    "variants": [
        {"name": "full", "label": "full", "retention": None},
        {"name": "plphp@0.5", "label": "plphp", "retention": 0.5},
        {"name": "plphp@0.1", "label": "plphp", "retention": 0.1},
        {"name": "[zero]", "label": "[zero]", "retention": None},
    ],
    "tasks": {
        "cell": {
            "group": "one_image",
            "metric": "exact_match",
            "chance": 0.01,
            "scored": True,
            "samples": 7,
            "skipped": 0,
            "variants": {
                "full": figures(0.9, 1),
                "plphp@0.5": figures(0.8, 0.51),
                "plphp@0.1": figures(0.4, 0.12),
                "[zero]": figures(0.1, 0),
            },
        }
    },
}
VARIANTS = METRICS["tasks"]["cell"]["variants"]
METRICS["groups"] = {"one_image": {"tasks": ["cell"], "samples": 7, "skipped": 0, "variants": VARIANTS}}
METRICS["overall"] = {"groups": ["one_image"], "samples": 7, "skipped": 0, "variants": VARIANTS}


def several_groups() -> dict[str, Any]:
    """Two groups, of two tasks and of one, with everything that a table may show."""
    lines = {name: {**values, "vs_baseline": interval(-1)} for name, values in VARIANTS.items()}
    lines["plphp@0.1"]["score"] = {"mean": 1.0, "low": 1.0, "high": 1.0}
    task = {**METRICS["tasks"]["cell"], "skipped": 2, "variants": lines}
    group = {"samples": 7, "skipped": 2, "variants": lines}
    long = "recall_rank:layers=vision_attention,value_norm=1,floor=0.2"
    variants = [
        {**variant, "label": long if variant["label"] == "plphp" else variant["label"]}
        for variant in METRICS["variants"]
    ]
    return {
        **METRICS,
        "baseline": "[zero]",
        "variants": variants,
        "tasks": {"cell": task, "lookup": task, "second": {**task, "group": "dialogue"}},
        "groups": {"one_image": {"tasks": ["cell", "lookup"], **group}, "dialogue": {"tasks": ["second"], **group}},
        "overall": {"groups": ["one_image", "dialogue"], **group},
    }
