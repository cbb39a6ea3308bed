# SPDX-License-Identifier: Apache-2.0
"""lmms-eval says of every sample what plphp eval says of it, whatever the batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from local_tasks import COUNT, DATA, answers, evaluate

pytestmark = pytest.mark.filterwarnings("default")

METHODS = {
    "full": "none",
    "plphp": "plphp:target_retention=0.4",
    "query_bank": "query_bank:bank=bundled,retention_rate=0.1",
}
"""By the name in plphp eval, the settings."""


@pytest.fixture(scope="module")
def own(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By sample, the outcomes of the methods in plphp eval, which lets them decode side by side."""
    from plphp.evaluation import EvalSettings
    from plphp.evaluation import evaluate as plphp_eval

    methods = tuple(f"{name}={line}" for name, line in METHODS.items() if name != "full")
    settings = EvalSettings(methods=methods, data=(str(tasks / DATA),), dtype="float32", mode="decode")
    folder = tmp_path_factory.mktemp("eval")
    plphp_eval(settings, folder)
    [file] = (folder / "predictions").iterdir()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("batch", [1, 8])
def test_every_sample_has_the_score_of_plphp_eval(tasks: Path, own: list[dict[str, Any]], batch: int) -> None:
    assert len(own) == COUNT
    right = {}
    for name, line in METHODS.items():
        results = evaluate(tasks, f"config='{line}',dtype=float32", batch_size=batch)
        outcomes = [record["outcomes"][name] for record in sorted(own, key=lambda record: record["index"])]
        said = [outcome.get("text", reference) for outcome, reference in zip(outcomes, references(own), strict=True)]
        assert answers(results) == said
        scores = {sample["doc_id"]: sample["exact"] for sample in results["samples"]["plphp_local"]}
        assert [scores[number] for number in range(COUNT)] == [outcome["score"] for outcome in outcomes]
        assert results["results"]["plphp_local"]["exact,none"] == sum(scores.values()) / COUNT
        held = sum(outcome["kept"] for outcome in outcomes) / COUNT
        # Batches of several sizes of prompts are weighed by their rows, and not by their tokens.
        assert results["throughput"]["avg_plphp_held"] == pytest.approx(held, abs=1e-9 if batch == 1 else 0.02)
        right[name] = sum(scores.values())
    assert right["full"] > right["query_bank"] > right["plphp"], "the methods are to differ, or nothing is shown"


def references(records: list[dict[str, Any]]) -> list[str]:
    return [record["references"][0][0] for record in sorted(records, key=lambda record: record["index"])]


def test_the_command_line(tasks: Path, tmp_path: Path) -> None:
    """Settings with commas survive it, and its results file says what was held."""
    arguments = f"config='{METHODS['query_bank']}',dtype=float32"
    command = ("--model", "plphp", "--model_args", arguments, "--tasks", "plphp_local", "--include_path", tasks)
    more = ("--limit", 4, "--batch_size", 4, "--log_samples", "--output_path", tmp_path)
    done = subprocess.run([sys.executable, "-m", "lmms_eval", *map(str, (*command, *more))], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    [results] = map(json.loads, (path.read_text() for path in tmp_path.rglob("*_results.json")))
    assert results["throughput"]["avg_plphp_held"] == pytest.approx(0.1, abs=0.01)
    [samples] = tmp_path.rglob("*_samples_plphp_local.jsonl")
    assert len(samples.read_text().splitlines()) == 4
