# SPDX-License-Identifier: Apache-2.0
"""``plphp eval``."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import tiny_hub
from plphp.cli import app
from plphp.cli._eval_progress import shown_progress
from plphp.evaluation import METRICS
from plphp.evaluation.settings import MODES
from plphp.evaluation.tasks.built_in import all_tasks
from plphp.evaluation.tasks.choices import SPLITS
from plphp.inputs.sources import DTYPES

SOURCES = Path(__file__).parents[2] / "src"


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
    methods = ("--methods", "mine=plphp:query_rows=text,gqa_reduction=max,uniform", "--target-retention", "0.5,0.1")
    shown = ok(*methods, *out, *more)
    (folder / "shown.json").write_text(shown)
    return folder


def test_a_run(results: Path) -> None:
    shown = json.loads((results / "shown.json").read_text())
    plots = shown.pop("plots")
    assert shown == json.loads((results / "run" / "metrics.json").read_text())
    assert [variant["name"] for variant in shown["variants"]] == [
        "full",
        "mine@0.5",
        "mine@0.1",
        "uniform@0.5",
        "uniform@0.1",
    ]
    assert [Path(plot).name for plot in plots] == ["score-one_image.png"]
    settings = json.loads((results / "run" / "config.json").read_text())["variants"][1]["config"]
    assert (settings["query_rows"], settings["gqa_reduction"], settings["target_retention"]) == ("text", "max", 0.5)
    assert json.loads((results / "quality.json").read_text())["command"].startswith("plphp eval --methods mine=plphp")


def test_a_report_shows_it_again(results: Path) -> None:
    shown = ok("--report", results / "run", "--baseline", "uniform", "--per-task")
    assert shown.count("cell, exact_match, chance") == shown.count("score (95 %)") == 1
    assert "one_image: cell, exact_match, chance 1 %, 2 samples" in shown
    assert re.search(r"mine +50 +50\.\d", shown)
    assert "- uniform" in shown
    metrics = json.loads(ok("--report", results / "run", "--baseline", "uniform", "--json"))
    assert metrics["tasks"] == json.loads((results / "run" / "metrics.json").read_text())["tasks"]


def test_tasks_are_listed() -> None:
    assert [task["name"] for task in json.loads(ok("--list", "--json"))] == list(all_tasks())
    assert "one_image" in ok("--list")


def test_prompts_without_answers(tmp_path: Path) -> None:
    tiny_hub.picture(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text('{"images": ["a.png"], "question": "What?"}\n')
    run_it = ("--label-free", "--prompts", tmp_path / "p.jsonl", "--methods", "zero", "--max-new-tokens", 8)
    shown = ok(*run_it, "--out", tmp_path / "out")
    assert "agree" in shown
    assert "score" not in shown
    assert "prompts: p, not in the mean" in " ".join(shown.split())


def test_mistakes_end_as_one_line(results: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "Give one of --out" in error()
    assert "Give one of --out" in error("--list", *out)
    assert "Did you mean 'cell'" in error("--tasks", "cel", *out)
    assert "separated by commas, got ' '" in error("--tasks", " ", *out)
    assert "Did you mean 'plphp'" in error("--methods", "plhp", *out)
    assert "numbers by commas" in error("--target-retention", "a,b", *out)
    assert "no folder" in error("--results", tmp_path / "not" / "there.json", *out)
    assert "is a file: name a folder" in error("--out", results / "quality.json")
    assert "Unknown metric 'exact'" in error("--metric", "exact", *out)
    assert "mode must be one of auto, verify" in error("--mode", "verfy", *out)
    assert "dtype must be" in error("--dtype", "float23", *out)
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


def test_choices_stand_in_the_help() -> None:
    shown = " ".join(re.sub(r"[^\w|-]+", " ", ok("--help")).replace("|", " ").split())
    for choices in ((*SPLITS,), (*METRICS,), (*MODES,), ("auto", "float32", "bfloat16", "float16")):
        for choice in choices:
            assert choice in shown
    assert "target-retention" in shown


@pytest.fixture(scope="module")
def with_broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The result of a run on data whose second image is broken, and its folder."""
    folder = tmp_path_factory.mktemp("broken")
    with (folder / "mine.jsonl").open("w") as file:
        for name in ("a.png", "b.png", "c.png"):
            tiny_hub.picture(folder / name)
            file.write(json.dumps({"image": name, "question": "What?", "answer": "A star."}) + "\n")
    (folder / "b.png").write_bytes(b"no image")
    result = run("--data", folder / "mine.jsonl", "--methods", "zero", "--dtype", "float32", "--out", folder / "out")
    return folder / "out", result


def test_a_skipped_sample_is_counted_in_the_last_line(with_broken: tuple[Path, Result]) -> None:
    folder, result = with_broken
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("1 of 3 samples were skipped (mine: 1)")
    assert "data: mine, exact_match, chance 0 %, 2 samples, 1 skipped" in result.stdout
    [skipped] = json.loads((folder / "metrics.json").read_text())["skipped"]["mine"]
    assert "b.png is not an image" in skipped["reason"]
    assert ok("--report", folder).splitlines()[-1] == last
    assert json.loads(ok("--report", folder, "--json"))["skipped"]["mine"] == [skipped]


def test_progress_without_a_terminal_is_lines(with_broken: tuple[Path, Result]) -> None:
    lines = [line for line in with_broken[1].stderr.splitlines() if " samples, " in line]
    assert [line.split(",")[:2] for line in lines] == [["1 of 3 samples", " mine"], ["3 of 3 samples", " mine"]]
    assert "note: the bundled model knows drawn shapes" in with_broken[1].stderr


def test_a_line_every_so_often(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with shown_progress(quiet=False) as progress:
        for done in range(1, 100):
            now[0] += 1
            progress("a" if done < 50 else "b", done, 99)
    shown = [line.split(" of ")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1", "21", "41", "50", "70", "90", "99"]
    with shown_progress(quiet=True) as progress:
        progress("a", 1, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_cuts_nothing(results: Path, width: int) -> None:
    """A real terminal, as far as the command can tell: `eval` asks for its width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    command = [sys.executable, "-m", "plphp", "eval", "--report", results / "run", "--baseline", "uniform"]
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "PYTHONPATH": str(SOURCES)}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(list(map(str, command)), stdin=slave, stdout=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux says so at the end
                break
            if not part:
                break
            shown += part
        assert process.wait(120) == 0
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    assert max(map(len, text.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for word in ("score (95 %)", "- full", "- uniform", "agree", "KL"):
        assert word in text
    assert ("(further columns)" in " ".join(text.split())) == (width == 80)


def test_choices_are_completed() -> None:
    options = {parameter.name: parameter for parameter in get_command(app).commands["eval"].params}
    for name, known in (("split", SPLITS), ("metric", METRICS), ("mode", MODES), ("dtype", DTYPES)):
        assert [item.value for item in options[name].shell_complete(None, "")] == list(known)
