# SPDX-License-Identifier: Apache-2.0
"""Results and card of a run hold the harness's figures, and are made again without scoring anything twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from plphp.evaluation import compact_results
from plphp.evaluation.results.store import read_records, records_path
from plphp.inputs.loading import load_weights
from plphp.inputs.weights import weights_hash
from training import checkpoints, export, results

TASKS = "cell", "colour_of", "second_grid"
RIGHT = {
    "cell": {"full": (1, 1), "zero": (1, 0), "blank": (0, 0)},
    "colour_of": {"full": (1, 0), "zero": (0, 0), "blank": (1, 0)},
    "second_grid": {"full": (1, 1), "zero": (0, 0), "blank": (0, 0)},
}
"""Outcomes of two samples each, put in the place of what an untrained model scores."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    held_out = {"grid": 0.98765, "text": 1.0}
    checkpoints.save(folder / "vision.pt", seed=5, seconds=90.0, steps=3, held_out=held_out)
    checkpoints.save(folder / "text.pt", seed=5, seconds=600.0, step=7, rows=12345)
    export.save(export.new_model(small=True), folder / results.MODEL)
    results.write_facts(folder, seed=5, threads=2)
    results.write(folder, folder / results.MODEL, samples=2, tasks=TASKS)
    for task, outcomes in RIGHT.items():
        records = read_records(folder / results.EVALUATION, task)
        for record in records:
            for name, scores in outcomes.items():
                record["outcomes"][name]["score"] = scores[record["index"]]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        records_path(folder / results.EVALUATION, task).write_text(lines)
    results.write(folder, folder / results.MODEL, samples=2, tasks=TASKS)
    return folder


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / results.RESULTS).read_text())


def cells(run: Path, start: str) -> list[str]:
    """The cells of the only line of the card's table that starts so."""
    card = (run / results.MODEL / "README.md").read_text()
    [line] = [line for line in card.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_are_the_harness_s_and_the_training_s(run: Path) -> None:
    written = read(run)
    expected = compact_results(run / results.EVALUATION)
    for key in ("tasks", "groups", "model", "versions"):
        assert written["evaluation"][key] == expected[key], key
    assert written["evaluation"]["tasks"]["cell"]["variants"]["zero"]["score"]["mean"] == 0.5
    settings = written["evaluation"]["settings"]
    assert (settings["split"], settings["samples"], settings["methods"]) == ("test", 2, ["zero", "blank"])
    training = written["training"]
    assert (training["seed"], training["vision_stage"]["steps"]) == (5, 3)
    assert training["text_stage"] == {"seconds": 600, "steps": 7, "rows": 12345}


def test_results_name_no_place_on_this_machine(run: Path) -> None:
    assert str(run) not in (run / results.RESULTS).read_text()
    command = read(run)["evaluation"]["command"]
    assert command.startswith("plphp eval --model MODEL --methods zero,blank")


def test_the_card_shows_the_figures(run: Path) -> None:
    assert cells(run, "`cell`") == [
        "`cell`",
        "one image",
        "what a cell of a grid shows",
        "100.0 (34.2, 100.0)",  # two samples of two, by Wilson
        "50.0",
        "0.0",
        "1.2",
    ]
    assert cells(run, "`colour_of`")[3:] == ["50.0 (0.0, 100.0)", "0.0", "50.0", "12.5"]
    group = cells(run, "mean of 2")
    assert group[1] == "one image"
    assert (group[3].split()[0], *group[4:]) == ("75.0", "25.0", "25.0", "")
    assert cells(run, "mean of 1")[1:5] == ["dialogue", "", "100.0 (34.2, 100.0)", "0.0"]
    assert cells(run, "mean of 3 scored tasks")[3:] == ["83.3", "16.7", "16.7", ""]


def test_the_card_says_which_weights_and_how_they_were_trained(run: Path) -> None:
    card = (run / results.MODEL / "README.md").read_text()
    assert "{{" not in card
    model = load_weights(run / results.MODEL)
    parameters = sum(weight.numel() for weight in model.parameters())
    size = (run / results.MODEL / "model.safetensors").stat().st_size
    assert f"({parameters / 1e6:.1f} million parameters, {size / 1e6:.1f} MB of bfloat16 weights)" in card
    assert f"`{weights_hash(model)}`" in card
    for said in (
        "1.5 minutes, 3 steps",
        "0.988 on grids, 1.000 on texts",
        "12,345 packed rows",
        "10.0 minutes, 7 steps",
    ):
        assert said in card, said


def test_made_again_from_the_command_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(run), (run / results.MODEL / "README.md").read_text()
    (run / results.RESULTS).unlink()
    (run / results.MODEL / "README.md").unlink()
    # Outcomes that were put in by hand are still there: nothing is scored again from another working folder.
    monkeypatch.chdir(run.parent)
    options = f"--run {run.name} --samples 2 --workers 1 --tasks {' '.join(TASKS)}"
    monkeypatch.setattr(sys, "argv", ["results", *options.split()])
    results.main()
    assert (read(run), (run / results.MODEL / "README.md").read_text()) == before
