# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of figures."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_figures import METRICS, several_groups

from plphp.errors import ConfigError
from plphp.evaluation import available_tasks, plot_scores, save_score_plots, score_tables, summarize, task_table


def text(*tables: Any, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(*tables)
    return console.file.getvalue()


def test_every_table_is_shown_once() -> None:
    titles = [str(table.title) for table in score_tables(METRICS, per_task=True)]
    assert titles == ["one_image: cell, exact_match, chance 1 %, 7 samples"]
    titles = [str(table.title) for table in score_tables(several_groups(), per_task=True)]
    assert [title.split(",")[0] for title in titles] == [
        "one_image: 2 tasks",
        "cell",
        "lookup",
        "dialogue: second",
        "overall: mean of 2 groups",
    ]
    assert titles[-1] == "overall: mean of 2 groups, 7 samples, 2 skipped"
    assert [str(table.title) for table in score_tables(several_groups())] == [titles[0], *titles[3:]]


@pytest.mark.parametrize("width", [60, 80, 110, 250])
def test_nothing_is_cut_off_in_a_narrow_terminal(width: int) -> None:
    metrics = several_groups()
    shown = text(*score_tables(metrics, per_task=True, width=width), width=width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert max(map(len, shown.splitlines())) <= width
    wide = text(*score_tables(metrics, per_task=True), width=250)
    for word in ("100.0 (100.0, 100.0)", "-100.0 (-105.0, -95.0)", "0.1250", "- full", "- [zero]", "KL", "agree"):
        assert shown.count(word) == wide.count(word) > 0, word
    assert ("(further columns)" in shown) == (width < 250)


def test_a_table_says_everything() -> None:
    shown = text(*score_tables(METRICS))
    assert "one_image: cell, exact_match, chance 1 %, 7 samples" in shown
    for part in ("plphp", "50", "51.0", "80.0 (75.0, 85.0)", "-10.0 (-15.0, -5.0)", "75.0", "0.1250", "[zero]"):
        assert part in shown
    assert "random" not in shown


def test_the_share_of_the_vision_entries_stands_beside_the_kv_where_text_left() -> None:
    assert "vision" not in text(*score_tables(METRICS)).splitlines()[2]
    metrics = copy.deepcopy(METRICS)
    metrics["groups"]["one_image"]["variants"]["plphp@0.1"]["vision_kept"] = 0.345
    shown = text(*score_tables(metrics))
    [line] = (line for line in shown.splitlines() if " 12.0 " in line)
    assert line.split()[:3] == ["10", "12.0", "34.5"]


def test_what_a_step_reads_stands_beside_what_is_held_where_it_is_less() -> None:
    metrics = copy.deepcopy(METRICS)
    variants = metrics["groups"]["one_image"]["variants"]
    for values in variants.values():
        values["read"] = values["kept"]
    assert "read" not in text(*score_tables(metrics))
    variants["plphp@0.1"]["read"] = 0.046
    shown = text(*score_tables(metrics))
    assert any(line.split()[:4] == ["method", "asked", "held", "read"] for line in shown.splitlines())
    [line] = (line for line in shown.splitlines() if " 12.0 " in line)
    assert line.split()[:3] == ["10", "12.0", "4.6"]
    [other] = (line for line in shown.splitlines() if " 51.0 " in line)
    assert other.split()[2:4] == ["51.0", "80.0"]


def test_what_a_step_reads_is_not_taken_for_what_is_held_where_it_was_not_measured() -> None:
    metrics = copy.deepcopy(METRICS)
    variants = metrics["groups"]["one_image"]["variants"]
    for name, values in variants.items():
        if name != "plphp@0.1":
            values["read"] = values["kept"]
    shown = text(*score_tables(metrics))
    [line] = (line for line in shown.splitlines() if " 12.0 " in line)
    assert line.split()[:3] == ["10", "12.0", "n/a"]
    assert shown.count("n/a") == 1


@pytest.mark.parametrize("measure", ["read", "vision_kept"])
def test_no_mean_of_the_samples_that_happen_to_say_it(measure: str, tmp_path: Path) -> None:
    """Those of earlier versions say neither."""
    task = {"name": "t", "group": "g", "metric": "exact_match", "mode": "verify", "chance": 0, "scored": True}
    variants = [{"name": name, "label": name, "retention": None} for name in ("full", "plphp")]
    config = {"format": 1, "settings": {}, "refused": {}, "tasks": [task], "variants": variants}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "predictions").mkdir()
    old, new = {"score": 1.0, "kept": 0.5}, {"score": 1.0, "kept": 0.5, measure: 0.25}
    for second, expected in ((new, 0.25), (old, None)):
        lines = [{"index": n, "outcomes": {"full": new, "plphp": own}} for n, own in enumerate((new, second))]
        (tmp_path / "predictions" / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        figures = summarize(tmp_path, resamples=10)["tasks"]["t"]["variants"]
        assert figures["full"][measure] == 0.25
        assert figures["plphp"].get(measure) == expected


def test_columns_without_values_are_left_out() -> None:
    bare = {name: {"kept": 1.0, "agreement": 1.0, "kl": 0.0} for name in METRICS["groups"]["one_image"]["variants"]}
    shown = text(
        *score_tables({**METRICS, "groups": {"g": {"tasks": [], "samples": 1, "skipped": 0, "variants": bare}}})
    )
    assert "score" not in shown
    assert "KL" in shown


def test_plots(tmp_path: Path) -> None:
    axes = plot_scores(METRICS, "one_image").axes[0]
    [line] = [line for line in axes.get_lines() if line.get_label() == "plphp"]
    assert line.get_xydata().tolist() == [[12.0, 40.0], [51.0, 80.0]]
    assert axes.get_xlabel() == "bytes held of the vision KV, measured (%)"
    assert {entry.get_text() for entry in axes.figure.legends[0].get_texts()} == {"full KV", "plphp", "[zero]"}
    assert save_score_plots(METRICS, tmp_path / "plots") == [tmp_path / "plots" / "score-one_image.png"]
    assert (tmp_path / "plots" / "score-one_image.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match="no group 'dialog'"):
        plot_scores(METRICS, "dialog")


def test_tasks_are_listed() -> None:
    shown = text(task_table(available_tasks().values()))
    assert all(name in shown for name in available_tasks())
    narrow = text(task_table(available_tasks().values()), width=80)
    assert "\N{HORIZONTAL ELLIPSIS}" not in narrow
    assert all(name in narrow for name in available_tasks())
