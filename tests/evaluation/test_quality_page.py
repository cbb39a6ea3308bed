# SPDX-License-Identifier: Apache-2.0
"""docs/quality.md and docs/quality-tables.md are what their generator makes of the committed results."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from sample_figures import METRICS

ROOT = Path(__file__).parents[2]
ABOUT = {
    "command": "plphp eval --out DIR",
    "date": "2026-01-01",
    "hardware": {"device": "CPU", "cores": 2},
    "versions": {"plphp": "1"},
    "model": {"model_class": "M", "parameters": 8_000_000, "decoder_layers": 8, "dtype": "float32", "sha256": "abc"},
    "settings": {"model": None, "samples": 7, "split": "test", "seed": 0},
}


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that writes both pages."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_quality")


@pytest.fixture
def tables(generator: Any) -> Any:
    """The module with the text of the tables' page."""
    return importlib.import_module("quality_tables")


def test_the_tables_have_the_figures(tables: Any) -> None:
    page = tables.tables_page({**ABOUT, **METRICS, "refused": {"fastv@0.05": "too little"}})
    assert "| `plphp` | 80.0 (75.0, 85.0) | 40.0 (35.0, 45.0) [12.0] |" in page
    assert "| `plphp` | **-10.0** (-15.0, -5.0) | **-50.0** (-55.0, -45.0) [12.0] |" in page
    assert "| `full` | 100.0 | 90.0 (85.0, 95.0) | +0.0 (-5.0, +5.0) | 75.0; 0.1250 |" in page
    assert "| `plphp` | 51.0 | 12.0 |" in page
    assert "| `cell` | one_image | exact match | 1.0 | 90.0 | yes |" in page
    assert "- `fastv@0.05`: too little" in page
    assert "at the same retention" not in page
    assert "SHA-256 `abc`" in page


def test_all_groups_are_seen_at_a_glance(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GLANCE", (0.5, 0.1))
    page = tables.tables_page({**ABOUT, **METRICS, "refused": {}})
    assert "Score with 50 · 10 % of the vision KV" in page
    assert "| `full` | 90.0 |\n| `plphp` | 80.0 · 40.0 |" in page
    assert "| `[zero]` | 10.0 |" not in page


def test_conversations_under_a_budget_are_split_by_what_is_asked_about(tables: Any) -> None:
    def figures(mean: float, **more: Any) -> dict[str, Any]:
        return {"score": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}, "kept": 0.0999, **more}

    names = {"full": None, "ranked@0.1": 0.1, "oldest@0.1": 0.1, "newest@0.1": 0.1, "equal@0.1": 0.1}
    variants = [{"name": name, "label": name.partition("@")[0], "retention": rate} for name, rate in names.items()]
    scores = {
        "newest_image": (0.9, 0.9, 0.8, 0.95, 0.9),
        "old_image": (0.8, 0.7, 0.2, 0.1, 0.6),
        "two_images": (0.7, 0.6, 0.1, 0.1, 0.6),
    }
    tasks = {
        task: {"variants": {name: figures(score) for name, score in zip(names, own, strict=True)}}
        for task, own in scores.items()
    }
    lost = {"vs_baseline": {"mean": -0.4, "low": -0.5, "high": -0.3}}
    means = zip(names, (0.8, 0.75, 0.4, 0.38, 0.7), strict=True)
    overall = {"variants": {name: figures(mean, **lost) for name, mean in means}}
    results = {**ABOUT, "variants": variants, "tasks": tasks, "overall": overall, "baseline": "ranked"}
    page = tables.memory_section(results)
    assert "| | held % | the newest image | an old image | two images | mean difference |" in page
    own = "80.0 (70.0, 90.0) | 20.0 (10.0, 30.0) | 10.0 (0.0, 20.0) | -40.0 (-50.0, -30.0) |"
    assert f"| oldest, 10 % | 10.0 | {own}" in page
    assert page.count("-40.0") == 4  # the baseline is not compared with itself
    reached = " ".join(page.split("\n\n")[-1].split())
    assert "from the best of the others: +5.0 at 10 %: met." in reached
    assert "Old images at 10 % at least 20 points above `oldest`: +50.0, met." in reached
    assert "at most 5 points below `newest`: -5.0 at 10 %, met." in reached
    overall["variants"]["equal@0.1"]["score"]["mean"] = 0.75
    assert "+0.0 at 10 %: **missed**" in " ".join(tables.memory_section(results).split())


def test_chains_are_met_where_no_group_loses_more_than_three_points(tables: Any) -> None:
    chains = importlib.import_module("stage_tables").AIMED
    names = {"query_bank": None, "DivPrune@0.5": 0.5} | dict.fromkeys(chains, 0.5)
    labels = {name: name.partition("@")[0] for name in names}
    variants = [{"name": name, "label": labels[name], "retention": rate} for name, rate in names.items()]

    def group(*differences: float) -> dict[str, Any]:
        """A group in which the lines are so far from the first, each by an interval of a point to both sides."""
        figures = {
            name: {
                "score": {"mean": 0.9 + own},
                "kept": 0.25,
                "vs_baseline": {"mean": own, "low": own - 0.01 * (own != 0), "high": own + 0.01 * (own != 0)},
            }
            for name, own in zip(names, differences, strict=True)
        }
        return {"variants": figures}

    groups = {"one_image": group(0, -0.02, -0.01, 0.02), "several_regions": group(0, -0.06, -0.031, -0.03)}
    results = {**ABOUT, "variants": variants, "groups": groups, "overall": group(0, -0.04, -0.02, -0.005)}
    page = " ".join(tables.chains_section(results).split())
    assert "| | held % | all | one image | several regions |" in page
    assert "| query_bank | 25.0 | 90.0 | 90.0 | 90.0 |" in page  # not compared with itself
    assert "| DivPrune, 50 % | 25.0 | 86.0, -4.0 (-5.0, -3.0) | 88.0, -2.0 (-3.0, -1.0) |" in page
    assert "as in the paper: one image -1.0; several regions -3.1: **missed**." in page
    assert page.endswith("By Euclidean distance: one image +2.0; several regions -3.0: met.")


def compared(rates: Iterable[float]) -> dict[str, Any]:
    """Results of two groups, with what a method loses and how it stands beside random draws."""

    def figures(vs_full: float, vs_baseline: float) -> dict[str, Any]:
        score = {"mean": 0.9 + vs_full, "low": 0.0, "high": 1.0}
        differences = {"vs_full": vs_full, "vs_baseline": vs_baseline}
        spread = {name: {"mean": mean, "low": mean - 0.01, "high": mean + 0.01} for name, mean in differences.items()}
        return {"score": score, "kept": 0.5, **spread}

    losses = {"plphp": (-0.4, -0.3), "query_bank": (-0.1, 0.005), "oracle": (0.0, 0.1), "random1": (-0.1, 0.0)}
    variants = [{"name": f"{label}@{rate}", "label": label, "retention": rate} for label in losses for rate in rates]
    by_name = {variant["name"]: figures(*losses[variant["label"]]) for variant in variants}
    group = {"tasks": ["cell"], "samples": 7, "variants": {"full": figures(0.0, 0.0), **by_name}}
    worse = {**group, "variants": {**group["variants"], "plphp@0.1": figures(-0.75, -0.6)}}
    return {
        **ABOUT,
        "variants": [{"name": "full", "label": "full", "retention": None}, *variants],
        "groups": {"one_image": group, "dialogue": worse},
        "baseline": "random1",
        "tasks": {},
        "refused": {},
    }


def with_rivals(gain: float = 0.2, own: float = -0.01) -> dict[str, Any]:
    """Results of two groups with ragged heads, a bank of its own and a rival, beside paired differences."""
    rates = (0.5, 0.25, 0.1, 0.05)
    results = compared(rates)
    for group in results["groups"].values():
        variants = group["variants"]
        for rate in rates:
            name = f"query_bank@{rate}"
            score = {**variants[name]["score"], "low": 0.79, "high": 0.81}
            variants[name] = {**variants[name], "score": score}
            variants[f"plphp@{rate}"]["score"] = {"mean": 0.5, "low": 0.48, "high": 0.8 if rate == 0.1 else 0.52}

    def spread(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}

    parts = [*results["groups"], "overall"]
    paired = {
        "query_bank_equal": {part: {f"query_bank@{rate:g}": spread(gain) for rate in rates} for part in parts},
        "query_bank": {part: {f"query_bank_own@{rate:g}": spread(own) for rate in rates} for part in parts},
    }
    overall = {"variants": {f"query_bank@{rate:g}": {"vs_full": spread(-0.02)} for rate in rates}}
    return {**results, "apart": {"groups": 0.001, "tasks": 0.02}, "rivals": {"paired": paired, "overall": overall}}


def test_what_was_aimed_at_stands_beside_what_was_measured(tables: Any) -> None:
    page = tables.tables_page(with_rivals())
    over_equal = "| ragged heads at least {} points above equal ones at {} %, and above in every group | {} | {} |"
    assert over_equal.format(12, 10, "+20.0 (+19.0, +21.0); least in a group +20.0", "met") in page
    assert "| at most 1 points below the full cache at 50 % | -2.0 (-3.0, -1.0) | **missed** |" in page
    assert "| at most 4 points below the full cache at 25 % | -2.0 (-3.0, -1.0) | met |" in page
    assert "| the bank of 16 prompts within 4 points of the bundled one at 5 % | -1.0 (-2.0, +0.0) | met |" in page
    assert "| above every rival at 50 % | 80.0 against 80.0 of `random1@0.5`; least difference of a group: +0.0" in page
    assert "differ by at most 0.1 points in a group and 2.0 on a task" in page
    assert "## What was aimed at" not in tables.tables_page({**METRICS, **ABOUT, "refused": {}})


def test_an_aim_that_was_missed_is_called_so(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RIVALS", ("plphp",))
    page = tables.tables_page(with_rivals(gain=0.13, own=-0.05))
    assert "+13.0 (+12.0, +14.0); least in a group +13.0 | met |" in page
    assert "+13.0 (+12.0, +14.0); least in a group +13.0 | **missed** |" in page
    assert "at 5 % | -5.0 (-6.0, -4.0) | **missed** |" in page
    row = "| above every rival at {} | 80.0 against {} of `plphp@{}`; least {} of a group: {}, `plphp@{}`, one image |"
    row += " {} |"
    assert row.format("50 %", "50.0", 0.5, "difference", "+30.0", 0.5, "met") in page
    strict = "{} %, by more than the intervals"
    assert row.format(strict.format(25), "50.0", 0.25, "between the intervals", "+27.0", 0.25, "met") in page
    line = row.format(strict.format(10), "50.0", 0.1, "between the intervals", "-1.0", 0.1, "in the mean alone")
    assert line in page


def test_a_rival_that_is_ahead_in_a_single_group_is_named(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RIVALS", ("plphp", "random1"))
    results = with_rivals()
    for group, mean in (("one_image", 0.9), ("dialogue", 0.1)):
        variants = results["groups"][group]["variants"]
        for name, score in (("plphp@0.5", mean), ("random1@0.5", 0.6)):
            variants[name] = {**variants[name], "score": {"mean": score, "low": score, "high": score}}
    page = tables.tables_page(results)
    line = "80.0 against 60.0 of `random1@0.5`; least difference of a group: -10.0, `plphp@0.5`, one image |"
    assert f"{line} in the mean alone |" in page


def test_two_runs_are_joined_where_what_both_hold_scores_the_same() -> None:
    joining = importlib.import_module("joined_results")
    earlier, later = compared((0.5,)), compared((0.5,))
    for run in (earlier, later):
        run["settings"] = {**run["settings"], "tasks": []}
        run["model"] = ABOUT["model"]
    new = {"name": "query_bank_own@0.5", "label": "query_bank_own", "retention": 0.5}
    later["variants"] = [*later["variants"], new]
    for group in later["groups"].values():
        group["variants"] = {**group["variants"], new["name"]: group["variants"]["oracle@0.5"]}
    both = joining.joined(earlier, later)
    names = [variant["name"] for variant in both["variants"]]
    assert names.count("plphp@0.5") == 1
    assert {"query_bank_equal@0.5", "query_bank@0.5", "query_bank_own@0.5"} <= set(names)
    assert set(names) <= set(both["groups"]["dialogue"]["variants"])
    assert both["apart"] == {"groups": 0, "tasks": 0}
    later["groups"]["dialogue"]["variants"]["random1@0.5"]["score"]["mean"] += 0.008
    assert joining.joined(earlier, later)["apart"]["groups"] == pytest.approx(0.008)
    later["groups"]["dialogue"]["variants"]["random1@0.5"]["score"]["mean"] += 0.008
    with pytest.raises(SystemExit, match=r"random1@0.5 scores .* on"):
        joining.joined(earlier, later)
    later["settings"]["seed"] = 1
    with pytest.raises(SystemExit, match="they differ in seed"):
        joining.joined(earlier, later)


def test_the_first_page_is_one_screen_with_the_answer(generator: Any) -> None:
    page = generator.page(compared(generator.GLANCE))
    text = " ".join(page.split())
    assert "The bundled model (8.0 M parameters, 8 layers) on 2 held-out tasks" in text
    assert "of the prompt): loses 40.0 · 40.0 · 75.0 · 40.0; above random draws in 0 of 8, below in 8." in text
    assert "for its places): loses 10.0 · 10.0 · 10.0 · 10.0; above random draws in 0 of 8, below in 0." in text
    assert "(the control: random draws): loses 10.0 · 10.0 · 10.0 · 10.0." in text
    assert "| everything kept | 90.0 | 90.0 |" in page
    assert "| `plphp` | 50.0 · 50.0 · 50.0 · 50.0 | 50.0 · 50.0 · 15.0 · 50.0 |" in page
    assert "snapkv" not in page
    assert len(generator.page(*generator.committed()[:1]).splitlines()) <= 70


def test_the_first_page_compares_with_random_draws_alone(generator: Any) -> None:
    page = generator.page({**compared(generator.GLANCE), "baseline": "plphp"})
    assert "above random draws" not in page


def test_the_tables_have_what_else_was_measured(tables: Any) -> None:
    retention = {"prompts": 9, "vision_tokens_min": 196, "vision_tokens_max": 784, "retention_std": 0.05}
    row = {"target": 0.5, "config": {}, "others": {**retention, "retention_mean": 0.47}}
    page = tables.tables_page(
        {**ABOUT, **METRICS},
        {
            "ablation": {**ABOUT, **METRICS, "baseline": "plphp"},
            "attention": {"prompts": 9, "re_attention": {"1": "query rows last 1: it appears"}},
            "calibration": {"targets": [row]},
            "transfer": {
                "samples": 7,
                "split": "dev",
                "groups": {
                    name: {"variants": METRICS["variants"], "figures": group["variants"]}
                    for name, group in METRICS["groups"].items()
                },
            },
        },
    )
    assert "Difference in score from `plphp`" in page
    assert "- query rows last 1: it appears" in page
    assert "### One image with a bank of other groups\n\n| | 50 %" in page
    assert "| 0.5 | 0.470 ± 0.050 |" in page
    assert "over 9 prompts" in page


def test_results_of_other_weights_are_not_joined(
    generator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    monkeypatch.setattr(generator, "RESULTS", tmp_path / "quality.json")
    monkeypatch.setattr(generator, "RIVALS", tmp_path / "rivals.json")
    (tmp_path / "quality.json").write_text(json.dumps({**ABOUT, **METRICS}))
    (tmp_path / "attention.json").write_text(json.dumps({"model": "the bundled model", "sha256": "abc"}))
    assert generator.committed()[1]["attention"]["sha256"] == "abc"
    (tmp_path / "attention.json").write_text(json.dumps({"model": "the bundled model", "sha256": "other"}))
    with pytest.raises(SystemExit, match=r"attention\.json was measured on other weights"):
        generator.committed()


def test_the_committed_pages_are_up_to_date(generator: Any) -> None:
    results, others = generator.committed()
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(results)
    assert generator.TABLES.read_text(encoding="utf-8") == generator.tables_page(results, others)
