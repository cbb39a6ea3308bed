# SPDX-License-Identifier: Apache-2.0
"""The quick start and the how-to pages run from top to bottom, as a user who pastes them would run them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serving_load
from command_line import ok
from PIL import Image

from plphp.families.registry import FAMILIES_BY_NAME
from plphp.inputs.sources import bundled_model_path
from plphp.methods.registry import METHODS_BY_NAME
from server_page import RIGHT, asked, blocks, started, talked

ROOT = Path(__file__).parents[2]
HOW_TO = ROOT / "docs" / "how-to"
HUB_NAME = "Qwen/Qwen2.5-VL-3B-Instruct"
"""The model that the pages name. The hub cannot be reached from the tests; the bundled model stands in for it."""
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INSTALL = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")


class Reader:
    """A user who pastes the blocks of a page, in their order, into one shell and one Python.

    Parameters
    ----------
    path : Path
        The page.
    monkeypatch : MonkeyPatch
        Takes back what the reader installs.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = path.read_text(encoding="utf-8").replace(HUB_NAME, str(bundled_model_path()))
        self.monkeypatch = monkeypatch
        self.names: dict[str, Any] = {}
        self.printed: dict[str, str] = {}

    def blocks(self) -> list[tuple[str, str]]:
        """Language and text of each block."""
        return BLOCKS.findall(self.text)

    def paste(self, language: str, block: str) -> None:
        """Run a block."""
        if language == "python":
            exec(block, self.names)
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                self.run(shlex.split(line, comments=True))

    def run(self, words: list[str]) -> None:
        """Run a line of a shell: plphp in this process, and pip into a folder of the test."""
        command, *arguments = words
        if command == "plphp":
            lines = None
            if "<" in arguments:
                *arguments, _, path = arguments
                lines = Path(path).read_text(encoding="utf-8")
            self.printed[" ".join(words)] = ok(*arguments, lines=lines)
            return
        assert words[:2] == ["pip", "install"], f"no test can run {words}: say it in words"
        folder = Path("installed").absolute()
        subprocess.run([sys.executable, "-m", "pip", *arguments, *INSTALL, "--target", str(folder)], check=True)
        self.monkeypatch.syspath_prepend(folder)
        self.monkeypatch.setattr(METHODS_BY_NAME, "_discovered", None)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Reader]:
    """Paste a page of docs/ in a folder with what the pages take for granted; pictures are such as the model knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})
    monkeypatch.setattr(FAMILIES_BY_NAME, "registered", {})
    images = tmp_path / "examples" / "images"
    shutil.copytree(ROOT / "examples" / "images", images)
    shutil.copy(images / "grid-1.png", "photo.png")
    shutil.copy(images / "grid-2.png", "second.png")
    Path("documents").mkdir()
    shutil.copy(images / "page-1.png", "documents")
    Image.open(images / "page-2.png").convert("RGB").save("documents/page-2.JPG", quality=95)
    Path("documents", "notes.txt").touch()

    def paste_all(name: str) -> Reader:
        reader = Reader(ROOT / "docs" / name, monkeypatch)
        for language, block in reader.blocks():
            reader.paste(language, block)
        return reader

    return paste_all


def test_every_page_has_a_test() -> None:
    tested = {f"{name.replace('_', '-')}.md" for name in re.findall(r"def test_page_(\w+)", Path(__file__).read_text())}
    assert {page.name for page in HOW_TO.glob("*.md")} == tested


def test_quick_start(read: Callable[[str], Reader]) -> None:
    reader = read("quick-start.md")
    assert list(Path("plots").glob("*.png"))
    assert 0.5 < reader.names["run"].report.kv_reduction < 1


def test_page_own_photo(read: Callable[[str], Reader]) -> None:
    reader = read("how-to/own-photo.md")
    assert Path("photo.html").is_file()
    assert list(Path("plots").glob("*.png"))
    assert reader.names["run"].report.retention == 1.0


def test_page_folder_of_documents(read: Callable[[str], Reader], capsys: pytest.CaptureFixture[str]) -> None:
    reader = read("how-to/folder-of-documents.md")
    assert [len(cache.report().prompts) for cache in reader.names["caches"].values()] == [1, 1]
    # The right answers to the first line and to the second of both pages.
    printed = capsys.readouterr().out
    assert [answer for answer in ("24Y", "AVR", "UUT", "YU69KV") if answer not in printed] == []
    assert 0 < reader.names["cache"].report().vision_held < 1


def test_page_chat(read: Callable[[str], Reader]) -> None:
    reader = read("how-to/chat.md")
    starts = [(prompt.start > 0, len(prompt.images[0])) for prompt in reader.names["run"].report.prompts]
    assert starts == [(False, 1), (True, 1)]
    (talked,) = (printed for command, printed in reader.printed.items() if command.startswith("plphp chat"))
    assert talked.count("Row 1 shows") == 2
    assert "Row 2 shows" in talked
    assert "what is held of each image" in talked
    cache = reader.names["cache"]
    assert (len(cache.images), cache.report().vision_bytes <= 300_000) == (8, True)
    assert reader.names["last"].startswith("Row 1 shows")


def test_page_benchmark(read: Callable[[str], Reader]) -> None:
    read("how-to/benchmark.md")
    assert Path("results", "metrics.json").is_file()
    assert list(Path("results", "plots").glob("*.png"))


def test_page_new_method(read: Callable[[str], Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks behind a sentence that begins with a file's name are the text of that file."""
    text = (HOW_TO / "new-method.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^`(best-head/[\w.]+)` [^`]*?```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(files) == 2
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")
    reader = read("how-to/new-method.md")
    assert "best_head" in reader.printed["plphp methods"]
    assert reader.names["run"].report.config["method"] == "best_head"


def test_page_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the engine transformers; tests/engines/vllm/test_how_to.py has vLLM."""
    pytest.importorskip("uvicorn")
    arguments, environment = started(blocks("sh")[0])
    assert environment == {}
    monkeypatch.chdir(ROOT)
    with serving_load.running(["plphp", *arguments], os.environ, tmp_path / "server.log") as port:
        answer, metrics = asked(port)
        row, usage, again, deleted = talked(port)
    assert answer == RIGHT
    assert row.startswith("Row 1 shows")
    assert again.startswith("Row 1 shows")
    assert "'cached_tokens': 3" in usage
    assert '"deleted":true' in deleted
    assert metrics["plphp_prompts_total"] == 1
    assert metrics["plphp_vision_tokens_total"] == 196
    assert metrics["plphp_kv_held_bytes_total"] < metrics["plphp_kv_full_bytes_total"]
    assert len(metrics) == 4
