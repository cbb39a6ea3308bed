# SPDX-License-Identifier: Apache-2.0
"""docs/quality.md is what its generator makes of the committed results."""

from __future__ import annotations

import importlib.util
import json
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


@pytest.fixture(scope="module")
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_quality", ROOT / "docs" / "make_quality.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_figures(generator: Any) -> None:
    page = generator.page({**ABOUT, **METRICS, "refused": {"fastv@0.05": "too little"}})
    assert "| `plphp` | 80.0 (75.0, 85.0) | 40.0 (35.0, 45.0) [12.0] |" in page
    assert "| `plphp` | **-10.0** (-15.0, -5.0) | **-50.0** (-55.0, -45.0) [12.0] |" in page
    assert "| `full` | 100.0 | 90.0 (85.0, 95.0) | +0.0 (-5.0, +5.0) | 75.0; 0.1250 |" in page
    assert "| `plphp` | 51.0 | 12.0 |" in page
    assert "| `cell` | one_image | exact match | 1.0 | 90.0 | yes |" in page
    assert "- `fastv@0.05`: too little" in page
    assert "at the same retention" not in page
    assert "SHA-256 `abc`" in page


def test_all_groups_are_seen_at_a_glance(generator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "GLANCE", (0.5, 0.1))
    page = generator.page({**ABOUT, **METRICS, "refused": {}})
    assert "Score with 50 · 10 % of the vision KV" in page
    assert "| `full` | 90.0 |\n| `plphp` | 80.0 · 40.0 |" in page
    assert "| `[zero]` | 10.0 |" not in page


def test_losses_stand_beside_what_was_aimed_at(generator: Any) -> None:
    def figures(vs_full: float, vs_baseline: float) -> dict[str, Any]:
        score = {"mean": 0.9 + vs_full, "low": 0.0, "high": 1.0}
        differences = {"vs_full": vs_full, "vs_baseline": vs_baseline}
        spread = {name: {"mean": mean, "low": mean - 0.01, "high": mean + 0.01} for name, mean in differences.items()}
        return {"score": score, "kept": 0.5, **spread}

    losses = {"plphp": (-0.4, -0.3), "query_bank": (-0.1, 0.005), "oracle": (0.0, 0.1), "random1": (-0.1, 0.0)}
    variants = [
        {"name": f"{label}@{rate}", "label": label, "retention": rate} for label in losses for rate in generator.AIMS
    ]
    full = {"name": "full", "label": "full", "retention": None}
    found = {one["name"]: figures(*losses[one["label"]]) for one in variants}
    group = {"tasks": ["cell"], "samples": 7, "variants": {"full": figures(0.0, 0.0), **found}}
    results = {
        **ABOUT,
        "variants": [full, *variants],
        "groups": {"one_image": group, "dialogue": group},
        "baseline": "random1",
        "tasks": {},
        "refused": {},
    }
    page = generator.page(results)
    line = "| {} | 25 | **-40.0** (-41.0, -39.0) | {} | **-10.0** (-11.0, -9.0) | 25 % | +0.5 (-0.5, +1.5) |"
    assert line.format("one image", "-1.5") in page
    assert line.format("dialogue", "") in page
    assert "aimed at" not in generator.page({**results, "baseline": "plphp"})
    assert "aimed at" not in generator.page({**results, "variants": [full, *variants[:-5]]})


def test_the_page_has_what_else_was_measured(generator: Any) -> None:
    retention = {"prompts": 9, "vision_tokens_min": 196, "vision_tokens_max": 784, "retention_std": 0.05}
    row = {"target": 0.5, "config": {}, "others": {**retention, "retention_mean": 0.47}}
    page = generator.page(
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
    (tmp_path / "quality.json").write_text(json.dumps({**ABOUT, **METRICS}))
    (tmp_path / "attention.json").write_text(json.dumps({"model": "the bundled model", "sha256": "abc"}))
    assert generator.committed()[1]["attention"]["sha256"] == "abc"
    (tmp_path / "attention.json").write_text(json.dumps({"model": "the bundled model", "sha256": "other"}))
    with pytest.raises(SystemExit, match=r"attention\.json was measured on other weights"):
        generator.committed()


def test_the_committed_page_is_up_to_date(generator: Any) -> None:
    if not generator.RESULTS.exists():
        pytest.skip("no results are committed yet")
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(*generator.committed())
