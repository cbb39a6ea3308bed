# SPDX-License-Identifier: Apache-2.0
"""``plphp eval``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tiny_hub
from plphp.cli import app
from plphp.evaluation import available_tasks


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def ok(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def error(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, and what it printed."""
    folder = tmp_path_factory.mktemp("eval")
    out = ("--tasks", "cell", "--samples", 2, "--dtype", "float32", "--out", folder / "run")
    more = ("--plots", "--results", folder / "quality.json", "--baseline", "uniform", "--json")
    methods = ("--methods", "mine=plphp:query_rows=text,gqa_reduction=max,uniform", "--retention", "0.5,0.1")
    shown = ok(*methods, *out, *more)
    (folder / "shown.json").write_text(shown)
    return folder


def test_a_run(results: Path) -> None:
    shown = json.loads((results / "shown.json").read_text())
    plots = shown.pop("plots")
    assert shown == json.loads((results / "run" / "metrics.json").read_text())
    assert [one["name"] for one in shown["variants"]] == ["full", "mine@0.5", "mine@0.1", "uniform@0.5", "uniform@0.1"]
    assert [Path(plot).name for plot in plots] == ["score-one_image.png"]
    settings = json.loads((results / "run" / "config.json").read_text())["variants"][1]["config"]
    assert (settings["query_rows"], settings["gqa_reduction"], settings["target_retention"]) == ("text", "max", 0.5)
    assert json.loads((results / "quality.json").read_text())["command"].startswith("plphp eval --methods mine=plphp")


def test_a_report_shows_it_again(results: Path) -> None:
    shown = ok("--report", results / "run", "--baseline", "uniform", "--per-task")
    assert "one_image: 1 task(s), 2 samples" in shown
    assert "cell: exact_match" in shown
    assert re.search(r"mine +50 +50\.\d", shown)
    assert "- uniform" in shown
    metrics = json.loads(ok("--report", results / "run", "--baseline", "uniform", "--json"))
    assert metrics["tasks"] == json.loads((results / "run" / "metrics.json").read_text())["tasks"]


def test_tasks_are_listed() -> None:
    assert [task["name"] for task in json.loads(ok("--list", "--json"))] == list(available_tasks())
    assert "one_image" in ok("--list")


def test_prompts_without_answers(tmp_path: Path) -> None:
    tiny_hub.picture(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text('{"images": ["a.png"], "question": "What?"}\n')
    run_it = ("--label-free", "--prompts", tmp_path / "p.jsonl", "--methods", "zero", "--max-new-tokens", 8)
    shown = ok(*run_it, "--out", tmp_path / "out")
    assert "agree" in shown
    assert "score" not in shown


def test_mistakes_end_as_one_line(results: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "Give one of --out" in error()
    assert "Give one of --out" in error("--list", *out)
    assert "Did you mean 'cell'" in error("--tasks", "cel", *out)
    assert "separated by commas, got ' '" in error("--tasks", " ", *out)
    assert "Did you mean 'plphp'" in error("--methods", "plhp", *out)
    assert "numbers by commas" in error("--retention", "a,b", *out)
    assert "split must be" in error("--split", "train", *out)
    assert "label-free" in error("--prompts", "p.jsonl", *out)
    assert "neither a .jsonl file" in error("--data", tmp_path / "missing.jsonl", *out)
    assert "is it the folder of a run?" in error("--report", tmp_path)
    assert "holds another evaluation" in error("--tasks", "cell", "--samples", 9, "--out", results / "run")
    (tmp_path / "d.jsonl").write_text('{"image": "b.png", "question": "What?", "answer": "x"}\n')
    assert "There is no image file" in error("--data", tmp_path / "d.jsonl", *out)
    tiny_hub.picture(tmp_path / "b.png")
    (tmp_path / "d.jsonl").write_text('{"image": "b.png", "question": "What?"}\n')
    assert '"answer" is missing' in error("--data", tmp_path / "d.jsonl", *out)
    (tmp_path / "d.jsonl").write_text("")
    assert "holds no samples" in error("--data", tmp_path / "d.jsonl", *out)
    assert not (tmp_path / "out").exists()
