# SPDX-License-Identifier: Apache-2.0
"""``plphp report``: a page of a question, of a file of questions, and of questions that are drawn."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Any

import pytest
from command_line import error, ok

import tiny_hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, two pictures and a file of questions."""
    made = tmp_path_factory.mktemp("report")
    tiny_hub.save(made / "model")
    for name in ("a", "b"):
        tiny_hub.picture(made / f"{name}.png", seed=ord(name))
    questions = [
        {"images": ["a.png"], "question": "What </script>?", "answer": "x"},
        {"images": ["a.png", "b.png"], "question": "Which?"},
    ]
    (made / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    return made


def ask(folder: Path, *arguments: object) -> tuple[object, ...]:
    return ("report", "--model", folder / "model", "--device", "cpu", "--max-new-tokens", 3, *arguments)


def data_of(page: Path) -> Any:
    return json.loads(page.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])


def test_a_question(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    one = ("--image", folder / "a.png", "--prompt", "What?", "--methods", "plphp,c3=quantized:tiers=c3,random")
    printed = ok(*ask(folder, *one, "--target-retention", "0.5,0.25", "--html", page))
    assert printed.startswith(f"{page}: 1 questions x 6 ways to answer, ")
    data = data_of(page)
    names = ["full", "plphp@0.5", "plphp@0.25", "c3", "random@0.5", "random@0.25"]
    assert [setting["name"] for setting in data["settings"]] == names
    (question,) = data["questions"]
    assert question["references"] == []
    retentions = {name: answer["retention"] for name, answer in zip(names, question["answers"], strict=True)}
    assert retentions["full"] == retentions["c3"] == 1.0
    assert retentions["random@0.25"] == 0.25


def test_a_file_of_questions_with_the_methods_that_are_compared_by_default(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    printed = json.loads(ok(*ask(folder, "--prompts", folder / "questions.jsonl", "--html", page, "--json")))
    data = data_of(page)
    assert printed["file"] == str(page)
    assert [question["question"] for question in printed["questions"]] == ["What </script>?", "Which?"]
    names = [
        "full",
        "c3",
        *(f"{method}@{rate}" for method in ("plphp", "snapkv", "random") for rate in (0.5, 0.25, 0.1)),
    ]
    assert [setting["name"] for setting in data["settings"]] == names
    assert [question["references"] for question in data["questions"]] == [["x"], []]
    assert [question["pictures"] for question in data["questions"]] == [[0], [0, 1]]
    for shown, told in zip(data["questions"], printed["questions"], strict=True):
        assert list(told["answers"]) == names
        for name, answer in zip(names, shown["answers"], strict=True):
            assert told["answers"][name]["answer"] == answer["text"]
            assert told["answers"][name]["kv_bytes"] == answer["held"]
            assert (told["answers"][name]["right"], told["answers"][name]["same"]) == (answer["right"], answer["same"])


def test_questions_are_drawn_where_none_is_asked(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    page = tmp_path / "page.html"
    ok(*ask(folder, "--methods", "uniform", "--target-retention", 0.5, "--html", page))
    questions = data_of(page)["questions"]
    assert len(questions) == 3
    assert all(question["text"] and question["references"] and question["pictures"] for question in questions)
    assert max(len(question["pictures"]) for question in questions) > 1


def test_it_is_opened(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.chdir(tmp_path)
    one = ("--image", folder / "a.png", "--prompt", "What?", "--methods", "uniform", "--target-retention", 0.5)
    ok(*ask(folder, *one, "--html", "a page.html"))
    assert opened == []
    ok(*ask(folder, *one, "--html", "a page.html", "--open"))
    assert opened == [f"file://{tmp_path}/a%20page.html"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--methods", "blank"), "blank changes the images"),
        (("--methods", "plhp"), "Did you mean 'plphp'?"),
        (("--methods", "query_bank"), "collect"),
    ],
    ids=str,
)
def test_methods_that_cannot_be_shown(folder: Path, tmp_path: Path, arguments: tuple[str, ...], part: str) -> None:
    one = ("--image", folder / "a.png", "--prompt", "What?", "--html", tmp_path / "page.html")
    assert part in error(*ask(folder, *one, *arguments))
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_line_of_the_file_is_said_with_its_place(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": [{"type": "image", "path": str(folder / "a.png")}]}]
    path.write_text(json.dumps({"turns": turns}))
    line = error(*ask(folder, "--prompts", path, "--html", tmp_path / "page.html"))
    assert f"{path}, line 1: a report shows single questions" in line
