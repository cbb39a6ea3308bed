# SPDX-License-Identifier: Apache-2.0
"""The difficult samples of VTC-Bench, from files that lmms-eval writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hard_split
import pytest


def samples(path: Path, values: list[Any], metric: str = "acc") -> str:
    path.write_text("\n".join(json.dumps({"doc_id": number, metric: value}) for number, value in enumerate(values)))
    return str(path)


def test_runs_are_scored_on_difficult_and_simple_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = samples(tmp_path / "full.jsonl", [1, 1, 1, 0, {"score": 0.9}, 1])
    smaller = samples(tmp_path / "smaller.jsonl", [0, 1, 0.4, 1, {"score": 0.2}, 1])
    pruned = samples(tmp_path / "pruned.jsonl", [1, 1, 0, 0, {"score": 0.6}, 0])
    monkeypatch.setattr(sys, "argv", ["hard_split.py", "--metric", "acc", full, smaller, pruned])
    hard_split.main()
    assert capsys.readouterr().out.splitlines() == [
        "3 difficult and 2 simple samples of 6",
        f"{pruned}: difficult 66.7 %, simple 50.0 %",
    ]
    short = samples(tmp_path / "short.jsonl", [1])
    monkeypatch.setattr(sys, "argv", ["hard_split.py", "--metric", "acc", full, smaller, short])
    with pytest.raises(SystemExit, match="lacks 4 of the samples"):
        hard_split.main()
    monkeypatch.setattr(sys, "argv", ["hard_split.py", "--metric", "anls", full, smaller, pruned])
    with pytest.raises(SystemExit, match="has no metric 'anls'; it has doc_id, acc"):
        hard_split.main()
