# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plphp.errors import ConfigError
from plphp.evaluation import available_tasks, plot_scores, save_score_plots, score_tables, task_table


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
            "variants": {
                "full": figures(0.9, 1),
                "plphp@0.5": figures(0.8, 0.51),
                "plphp@0.1": figures(0.4, 0.12),
                "[zero]": figures(0.1, 0),
            },
        }
    },
}
METRICS["groups"] = {"one_image": {"tasks": ["cell"], "samples": 7, "variants": METRICS["tasks"]["cell"]["variants"]}}


def text(*tables: Any) -> str:
    console = Console(width=110, file=io.StringIO())
    console.print(*tables)
    return console.file.getvalue()


def test_a_table_says_everything() -> None:
    shown = text(*score_tables(METRICS))
    assert "one_image: 1 task(s), 7 samples" in shown
    for part in ("plphp", "50", "51.0", "80.0 (75.0, 85.0)", "-10.0 (-15.0, -5.0)", "75.0", "0.1250", "[zero]"):
        assert part in shown
    assert "random" not in shown
    assert "exact_match, chance 1 %" in text(*score_tables(METRICS, per_task=True))


def test_columns_without_values_are_left_out() -> None:
    bare = {name: {"kept": 1.0, "agreement": 1.0, "kl": 0.0} for name in METRICS["groups"]["one_image"]["variants"]}
    shown = text(*score_tables({**METRICS, "groups": {"g": {"tasks": [], "samples": 1, "variants": bare}}}))
    assert "score" not in shown
    assert "KL" in shown


def test_plots(tmp_path: Path) -> None:
    axes = plot_scores(METRICS, "one_image").axes[0]
    [line] = [line for line in axes.get_lines() if line.get_label() == "plphp"]
    assert line.get_xydata().tolist() == [[12.0, 40.0], [51.0, 80.0]]
    assert {entry.get_text() for entry in axes.figure.legends[0].get_texts()} == {"full KV", "plphp", "[zero]"}
    assert save_score_plots(METRICS, tmp_path / "plots") == [tmp_path / "plots" / "score-one_image.png"]
    assert (tmp_path / "plots" / "score-one_image.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match="no group 'dialog'"):
        plot_scores(METRICS, "dialog")


def test_tasks_are_listed() -> None:
    shown = text(task_table(available_tasks().values()))
    assert all(name in shown for name in available_tasks())
