# SPDX-License-Identifier: Apache-2.0
"""The benchmark of serving measures what it says; how fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import ENVIRONMENT

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "serving.py"
IMAGE, LAYERS, BLOCK = 196, 8, 32
"""Vision tokens of an image, and layers, of the bundled model; tokens of a block."""


@pytest.mark.thorough
def test_the_pool_is_the_same_and_more_run(tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    settings = ["--settings", "uniform:retention_rate=0.3", "--requests", "4", "--images", "2", "--blocks", "40"]
    command = [sys.executable, str(SCRIPT), *settings, "--new-tokens", "40", "--rounds", "1", "--out", str(out)]
    env = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    off, on = found["capacity"]
    # A prompt takes 17 or 18 of the 40 blocks, so that two fit; 275 of 392 vision tokens leave, which are 8 blocks.
    assert (off["retention"], off["running_most"], off["freed_blocks"]) == (None, 2, 0)
    assert on["retention"] == (2 * IMAGE - 8 * BLOCK) / (2 * IMAGE)
    assert on["freed_blocks"] == 4 * 8 * LAYERS
    assert on["running_most"] > 2
    assert on["steps"] < off["steps"]
    assert (off["questions"], off["right"]) == (12, 12)
    assert 0 < on["right"] < 12
    assert [(row["variant"], len(row["runs"])) for row in found["load"]] == [
        ("off", 1),
        ("uniform:retention_rate=0.3", 1),
    ]
    assert all(row["output_throughput"] > 0 for row in found["load"])
    assert found["versions"]["vllm"].startswith("0.32")
    assert "4 clients at once over HTTP" in done.stdout
