# SPDX-License-Identifier: Apache-2.0
"""What is shown or refused before torch and transformers are imported, which takes seconds: by what is in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import plphp

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "images" / "grid-1.png"
COMMANDS = ("calibrate", "chat", "collect", "doctor", "estimate", "eval", "families", "generate", "inspect", "methods",
            "plot", "profile", "report", "serve", "ui")  # fmt: skip
SHOWN = [
    ("--help",),
    ("--version",),
    *((command, "--help") for command in COMMANDS),
    ("methods",),
    ("methods", "--json"),
    ("families",),
]
ASK = ("generate", "--image", str(EXAMPLE), "--prompt", "What?")
REFUSED = [
    (("generate", "--image", "nope.png", "--prompt", "a"), "There is no image file nope.png"),
    (("generate", "--image", __file__, "--prompt", "a"), "is not an image"),
    (("generate", "--video", "nope", "--prompt", "a"), "nope"),
    (("generate", "--image", str(EXAMPLE), "--prompt", ""), "--prompt is empty"),
    (("generate", "--image", str(EXAMPLE), "--prompt", " \n\t"), "--prompt is empty"),
    (("generate", "--chat", "nope.json"), "Cannot read the chat nope.json: there is no such file"),
    (("generate", "--chat", "/"), "Cannot read the chat /: it is a folder"),
    (("generate",), "either --prompt or --chat"),
    ((*ASK, "--method", "plhp"), "Unknown method 'plhp'. Did you mean 'plphp'?"),
    ((*ASK, "--config", "plhp"), "Did you mean 'plphp'?"),
    ((*ASK, "--config", "plphp:retention_rat=0.5"), "Did you mean 'retention_rate'?"),
    ((*ASK, "--config", "snapkv:windw=3"), "Did you mean 'window'?"),
    ((*ASK, "--config", "snapkv:kernel=4"), "must be an odd integer"),
    ((*ASK, "--config-file", "nope.toml"), "Cannot read the config file nope.toml"),
    ((*ASK, "--target-retention", "0"), "target_retention must be above 0, got 0"),
    ((*ASK, "--target-retention", "nan"), "target_retention must be between 0 and 1, got nan"),
    ((*ASK, "--retention-rate", "-0.1"), "retention_rate must be between 0 and 1, got -0.1"),
    ((*ASK, "--temperature", "0"), "--temperature must be above 0"),
    ((*ASK, "--temperature", "inf"), "--temperature must be above 0"),
    ((*ASK, "--temperature", "nan"), "--temperature must be above 0"),
    ((*ASK, "--top-p", "0"), "--top-p must be in (0, 1]"),
    ((*ASK, "--decode", "grph"), "decode must be one of 'eager', 'auto', 'graph', got 'grph'"),
    ((*ASK, "--dtype", "int4"), "dtype must be one of auto, float32, bfloat16, float16, got 'int4'"),
    ((*ASK, "--device", "cdua"), "There is no device 'cdua'"),
    ((*ASK, "--device", "cuda:x"), "There is no device 'cuda:x'"),
    ((*ASK, "--report", "no/such/folder/r.json"), "There is no folder no/such/folder to write the report to"),
    ((*ASK, "--report", "/"), "/ is a folder"),
    ((*ASK, "--model", "/nope"), "There is no model folder '/nope'"),
    ((*ASK, "--model", str(EXAMPLE)), "is a file"),
    ((*ASK, "--model", str(EXAMPLE.parent)), "holds no config.json"),
    ((*ASK, "--model", "nope/nope"), "the hub cannot be reached"),
    (("chat", "--image", "nope.png"), "There is no image file nope.png"),
    (("chat", "--system", " "), "--system is empty"),
    (("chat", "--seed", "1"), "--seed is for sampling"),
    (("chat", "--method", "plhp"), "Did you mean 'plphp'?"),
    (("profile", "--out", "p", "--prompts", "nope.jsonl"), "Cannot read the prompts nope.jsonl"),
    (("profile", "--out", "p", "--question", "a", "--image", "nope.png"), "There is no image file nope.png"),
    (("profile", "--out", "p", "--question", " ", "--image", str(EXAMPLE)), "--question is empty"),
    (("profile", "--out", str(EXAMPLE), "--question", "a"), "is a file: name a folder"),
    (("calibrate", "--out", "a.toml", "--prompts", "nope.jsonl"), "Cannot read the prompts nope.jsonl"),
    (("calibrate", "--out", "a.toml", "--prompts", __file__, "--method", "plhp"), "Did you mean 'plphp'?"),
    (
        ("calibrate", "--out", "a.toml", "--prompts", __file__, "--holdout", "nan"),
        "--holdout must be between",
    ),
    (("calibrate", "--out", "no/such/a.toml", "--prompts", __file__), "There is no folder no/such"),
    (("calibrate", "--out", "a.toml", "--prompts", __file__, "--model", "/nope"), "/nope"),
    (("collect", "--out", "a", "--prompts", "nope.jsonl"), "Cannot read the prompts nope.jsonl"),
    (("collect", "--out", "a", "--prompts", __file__, "--device", "nowhere"), "There is no device 'nowhere'"),
    (("estimate", "--gpu", "H20"), "Did you mean 'H200'?"),
    (("estimate", "--image-size", "640"), "WIDTHxHEIGHT"),
    (("estimate", "--target-retention", "0"), "target_retention must be above 0"),
    (("estimate", "--target-retention", "1.5"), "target_retention must be between 0 and 1"),
    (("estimate", "--model", "/nope"), "/nope"),
    (("eval", "--out", "x", "--list"), "Give one of --out DIR (run), --report DIR (show again) and --list"),
    (("eval", "--out", "x", "--target-retention", "a"), "must be numbers by commas"),
    (("eval", "--out", "x", "--tasks", " "), "--tasks takes one or several"),
    (("eval", "--out", "x", "--mode", "verfy"), "mode must be one of auto, verify"),
    (("eval", "--out", "x", "--split", "train"), "split must be one of dev, test"),
    (("eval", "--out", "x", "--metric", "exact"), "Did you mean 'exact_match'?"),
    (("eval", "--out", "x", "--prompts", "p.jsonl"), "use the label-free mode with it"),
    (("eval", "--out", "x", "--device", "nowhere"), "There is no device 'nowhere'"),
    (("eval", "--out", __file__), "is a file: name a folder"),
    (("inspect", "nope.json"), "Cannot read the report nope.json"),
    (("inspect", __file__), "not a JSON report"),
    (("plot", "nope.json", "--out", "p"), "Cannot read the report nope.json"),
    (("plot", __file__, "--out", "p", "--image", "nope.png"), "There is no image file nope.png"),
    (("report", "--html", "no/such/page.html"), "There is no folder no/such to write the page to"),
    (("report", "--html", "p.html", "--prompts", "nope.jsonl"), "Cannot read the prompts nope.jsonl"),
    (("report", "--html", "p.html", "--prompt", "a"), "--prompt and --image go together"),
    (("report", "--html", "p.html", "--image", str(EXAMPLE)), "--prompt and --image go together"),
    (("report", "--html", "p.html", "--prompt", " "), "--prompt is empty"),
    (("report", "--html", "p.html", "--prompts", __file__, "--prompt", "a"), "--prompts goes without"),
    (("report", "--html", "p.html", "--target-retention", "a"), "must be numbers by commas"),
    (("report", "--html", "p.html", "--image", "nope.png", "--prompt", "a"), "There is no image file nope.png"),
    (("report", "--html", "p.html", "--device", "nowhere"), "There is no device 'nowhere'"),
    (("serve", "--method", "plhp"), "Did you mean 'plphp'?"),
    (("ui", "--method", "plhp"), "Did you mean 'plphp'?"),
    ((*ASK, "--config-file", "nobody/nothing"), "Cannot read settings from plphp.toml of nobody/nothing"),
    ((*ASK, "--config-file", str(EXAMPLE.parent)), "holds no plphp.toml"),
]
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from plphp.cli import app

results = []
for arguments in json.load(sys.stdin):
    done = CliRunner().invoke(app, arguments)
    heavy = [name for name in ("torch", "transformers", "matplotlib", "numpy") if name in sys.modules]
    results.append([done.exit_code, done.stdout, done.stderr, heavy])
json.dump(results, sys.stdout)
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(plphp.__file__).parent.parent),
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "100",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, ...], list]:
    """What each command line ends with, all run in a process of their own."""
    lines = [*SHOWN, *(arguments for arguments, _ in REFUSED)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(lines), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("arguments", SHOWN, ids=" ".join)
def test_shown(outcomes: dict[tuple[str, ...], list], arguments: tuple[str, ...]) -> None:
    code, out, _, heavy = outcomes[arguments]
    assert (code, heavy) == (0, [])
    assert out.strip()


@pytest.mark.parametrize(("arguments", "part"), REFUSED, ids=lambda value: None if isinstance(value, str) else "-")
def test_refused(outcomes: dict[tuple[str, ...], list], arguments: tuple[str, ...], part: str) -> None:
    code, out, err, heavy = outcomes[arguments]
    assert (code, out, heavy) == (2, "", [])
    assert err.startswith("error: ")
    assert part in err
    assert len(err.splitlines()) == 1
