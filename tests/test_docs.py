# SPDX-License-Identifier: Apache-2.0
"""The documents' code runs, and their lists are those of the package."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import plphp
from plphp import registry
from plphp.families.unsupported import UNSUPPORTED
from plphp.loading import load_model
from plphp.sources import bundled_model_path

ROOT = Path(__file__).parents[1]
HUB_NAME = "llava-hf/llava-onevision-qwen2-7b-ov-hf"


def blocks(path: str) -> list[str]:
    """Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A folder with photo.png, and what a document's code may take for granted."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(next((ROOT / "examples" / "images").glob("grid*.png")), tmp_path / "photo.png")
    monkeypatch.setattr(registry, "_methods", {})
    monkeypatch.setattr(registry, "_families", {})
    model, processor = load_model()
    content = [{"type": "image", "image": Image.open("photo.png")}, {"type": "text", "text": "What is in row 1?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    yield {"model": model, "inputs": inputs}
    assert "generate" not in model.__dict__


def run_with_the_bundled_model(path: str) -> dict[str, Any]:
    """The names after all Python blocks of a document.

    The hub cannot be reached from the tests; the bundled model stands in for the model that the document names.
    """
    code = "\n".join(blocks(path))
    assert HUB_NAME in code
    names: dict[str, Any] = {}
    exec(code.replace(HUB_NAME, str(bundled_model_path())), names)
    return names


def test_readme_runs(scope: dict[str, Any]) -> None:
    names = run_with_the_bundled_model("README.md")
    assert names["run"].report.retention == pytest.approx(0.4, abs=0.05)
    assert names["answer"][0]["generated_text"]


def test_api_runs(scope: dict[str, Any]) -> None:
    names = run_with_the_bundled_model("docs/api.md")
    assert names["run"].report.retention == pytest.approx(0.4, abs=0.05)
    assert names["session"].report.retention == pytest.approx(0.4, abs=0.05)
    del names["cache"], names["model"]


@pytest.mark.parametrize("index", [0, 1], ids=["method", "family"])
def test_extending_runs(scope: dict[str, Any], index: int) -> None:
    exec(blocks("docs/extending.md")[index], scope)


def test_calibration_runs(scope: dict[str, Any]) -> None:
    prompts = [{"images": ["photo.png"], "question": f"What is in row {row}?"} for row in (1, 2, 3, 4)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    thresholds, bank = blocks("docs/calibration.md")
    exec(thresholds, scope)
    assert scope["config"] == plphp.PLPHPConfig.from_toml("preset.toml")
    assert len(scope["measured"].retentions) == 2
    exec(bank, scope)
    with plphp.prune(scope["model"], scope["config"]) as run:
        scope["model"].generate(**scope["inputs"][0], max_new_tokens=2)
    assert run.report.retention == pytest.approx(0.25, abs=0.01)


def test_families_page_lists_what_is_registered() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    for family in plphp.available_families().values():
        assert f"| {family.name} | {', '.join(f'`{name}`' for name in family.model_types)} | {family.notes} |" in page
    for name, reason in UNSUPPORTED.items():
        assert f"| `{name}` | {reason} |" in page


def test_concepts_page_names_every_method() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    assert all(f"| `{name}` |" in page for name in plphp.available_methods())


def test_api_page_names_everything_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in plphp.__all__ if f"`{name}" not in page and name != "Session"] == []
