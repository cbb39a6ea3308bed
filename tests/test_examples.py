# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are, with a tiny model and, where it is there, with the bundled one."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny_hub
from plphp import PLPHPConfig
from plphp.cli._settings import read_settings
from plphp.errors import LoadError
from plphp.inputs.sources import bundled_model_path

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "demo.py")

try:
    BUNDLED = bundled_model_path()
except LoadError:
    BUNDLED = None
needs_bundled = pytest.mark.skipif(BUNDLED is None, reason="there is no bundled model in this checkout")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub.save(tmp_path_factory.mktemp("hub"))


def test_there_are_examples() -> None:
    assert len(SHORT) >= 5


@pytest.mark.parametrize("example", SHORT, ids=lambda path: path.stem)
class TestShort:
    def test_is_short(self, example: Path) -> None:
        assert len(example.read_text(encoding="utf-8").splitlines()) <= 40

    @pytest.mark.parametrize("model", ["tiny", pytest.param("bundled", marks=needs_bundled)])
    def test_runs(
        self,
        example: Path,
        model: str,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(sys, "argv", [str(example), *([str(folder)] if model == "tiny" else [])])
        runpy.run_path(str(example), run_name="__main__")
        assert len(capsys.readouterr().out.splitlines()) >= 2


def page_data(page: Path) -> dict[str, Any]:
    """The data of a page that `plphp.show.html_report` made."""
    text = page.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


class TestDemo:
    def questions(self, folder: Path) -> Path:
        names = [tiny_hub.picture(folder / f"{seed}.png", seed=seed).name for seed in (1, 2)]
        questions = [
            {"images": names[:count], "question": "What [bold]?", "answer": "x", "kind": kind}
            for kind, count in (("single", 1), ("several", 2), ("lines", 1))
        ]
        (folder / "questions.json").write_text(json.dumps(questions))
        return folder

    def test_all_kinds_side_by_side(
        self,
        folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = ["--model", folder, "--images", self.questions(tmp_path), "--max-new-tokens", 6, "--rounds", 1]
        options += ["--html", tmp_path / "page.html"]
        options += ["--config", "uniform:retention_rate=0.5", "--config", "plphp:target_retention=0.25"]
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, options)])
        runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
        text = capsys.readouterr().out
        for part in ("KV cache", "decode per token", "vision attention", "What [bold]?", "several", "0 of 3"):
            assert part in text
        page = tmp_path / "page.html"
        assert f"To look at, in a browser: {page}" in text
        settings, questions = (page_data(page)[name] for name in ("settings", "questions"))
        assert [setting["name"] for setting in settings] == ["full", "uniform", "plphp"]
        assert [len(question["pictures"]) for question in questions] == [1, 2, 1]
        headings = [line.replace("┃", " ").split() for line in text.splitlines() if line.startswith("┃")]
        assert headings.count(["unpruned", "uniform", "plphp"]) == 3

    def test_the_bundled_model_is_shown_with_its_default_and_the_papers_method(self) -> None:
        bundled = [PLPHPConfig.parse(text) for text in runpy.run_path(str(EXAMPLES / "demo.py"))["BUNDLED"]]
        assert bundled == [read_settings(None, None, method, None, None, bundled=True) for method in (None, "plphp")]

    @needs_bundled
    def test_the_shipped_questions(self) -> None:
        questions = json.loads((EXAMPLES / "images" / "questions.json").read_text(encoding="utf-8"))
        assert {one["kind"] for one in questions} == {"single", "several", "lines"}
        assert all((EXAMPLES / "images" / name).is_file() for one in questions for name in one["images"])
