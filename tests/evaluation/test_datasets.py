# SPDX-License-Identifier: Apache-2.0
"""The user's own data: files, folders, and what the ``datasets`` library loads."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import tiny_hub
from plphp.errors import BackendUnavailableError, ConfigError, LoadError
from plphp.evaluation.answering import accepted_answers
from plphp.evaluation.datasets import DataTask, read_data
from plphp.evaluation.settings import EvalSettings, mode_of, resolve_tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        tiny_hub.picture(tmp_path / name)
    return tmp_path


def write(file: Path, *lines: Any) -> str:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


def samples(task: DataTask) -> list[Any]:
    return list(task.samples("dev", 100))


def test_a_file(folder: Path) -> None:
    path = write(
        folder / "mine.jsonl",
        {"image": "a.png", "question": "What?", "answer": "A star."},
        "",
        {
            "images": ["a.png", "b.png"],
            "question": "How many?",
            "answers": ["2", "two", "2"],
            "id": "x",
            "system": "Hi.",
        },
    )
    [task] = read_data(path, "contains")
    assert (task.name, task.group, task.metric, task.several) == ("mine", "data", "contains", True)
    first, second = samples(task)
    assert first.turns[0].answer == "A star."
    assert accepted_answers(first, 0) == ("A star.",)
    assert (second.id, second.system, len(second.images)) == ("x", "Hi.", 2)
    assert accepted_answers(second, 0) == ("2", "two")
    assert len(list(task.samples("test", 1))) == 1


def test_a_folder_with_dialogues_in_groups(folder: Path) -> None:
    turns = [{"question": "A?", "answer": "B.", "scored": False}, {"question": "C?", "answer": 4}]
    write(
        folder / "metadata.jsonl",
        {"file_name": "a.png", "turns": turns, "group": "talk"},
        {"file_name": "b.png", "question": "What?", "answer": "x", "group": "ask"},
    )
    talk, ask = read_data(str(folder))
    assert [talk.group, ask.group] == ["talk", "ask"]
    assert [talk.name, ask.name] == [f"{folder.stem}-talk", f"{folder.stem}-ask"]
    [sample] = samples(talk)
    assert [(turn.answer, turn.scored) for turn in sample.turns] == [("B.", False), ("4", True)]


def test_a_group_that_cannot_name_a_file_is_refused(folder: Path) -> None:
    line = {"image": "a.png", "question": "What?", "answer": "x", "group": "../a"}
    with pytest.raises(LoadError, match=r"the group '\.\./a' names files"):
        read_data(write(folder / "one.jsonl", line))


def test_several_answers_cannot_be_verified(folder: Path) -> None:
    line = {"image": "a.png", "question": "What?"}
    [one] = read_data(write(folder / "one.jsonl", {**line, "answer": "x"}))
    [two] = read_data(write(folder / "two.jsonl", {**line, "answers": ["x", "y"]}))
    assert [mode_of(one, "auto"), mode_of(two, "auto")] == ["verify", "decode"]
    with pytest.raises(ConfigError, match="'two' cannot be verified"):
        mode_of(two, "verify")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "entry 1: expected an object"),
        ("1", "line 1: expected an object"),
        ({"image": 3, "question": "What?", "answer": "x"}, r"line 1: Expected an image, got 3"),
        ({"image": "a.png", "images": ["a.png"], "question": "What?", "answer": "x"}, "line 1: .* named twice"),
        ({"question": "What?", "answer": "x"}, '"images" is missing or empty: a list of image files'),
        ({"image": "c.png", "question": "What?", "answer": "x"}, "line 1: There is no image file .*c.png"),
        ({"image": "a.png", "answer": "x"}, '"question" must be text, got None'),
        ({"image": "a.png", "question": "What?"}, '"answer" is missing or empty'),
        ({"image": "a.png", "question": "What?", "answers": []}, '"answer" is missing or empty'),
        ({"image": "a.png", "question": "What?", "answer": " "}, '"answer" is missing or empty'),
        ({"image": "a.png", "turns": []}, '"turns" must be a list'),
    ],
)
def test_bad_lines_are_named(folder: Path, line: Any, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        read_data(write(folder / "mine.jsonl", line))


def test_bad_files_are_named(folder: Path) -> None:
    with pytest.raises(LoadError, match="holds no samples"):
        read_data(write(folder / "empty.jsonl", ""))
    same = [write(folder / name, {"image": "../a.png" if "/" in name else "a.png", "question": "Q", "answer": "x"})
            for name in ("x.jsonl",)]  # fmt: skip
    with pytest.raises(ConfigError, match="Two tasks have the name 'x'"):
        resolve_tasks(EvalSettings(data=(same[0], same[0])))


class Table:
    """As much of a data set of the ``datasets`` library as is used."""

    column_names = ("image", "query", "label", "kind")
    rows = (
        {"image": Image.new("L", (9, 9)), "query": "What?", "label": ["7", "seven"], "kind": "human"},
        {"image": [Image.new("RGB", (9, 9))] * 2, "query": "Who?", "label": "me", "kind": "machine"},
    )

    def __init__(self, columns: tuple[str, ...] = column_names) -> None:
        self.columns = columns

    def select_columns(self, names: list[str]) -> Table:
        return Table(tuple(names))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.rows[row][name] for name in self.columns}


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*given: Any, **options: Any) -> Table:
        asked.append((given, options))
        return Table()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    tasks = read_data("someone/ChartQA:split=val,question=query,answer=label,group=kind,name=small", "relaxed_accuracy")
    assert asked == [(("someone/ChartQA", "small"), {"split": "val"})]
    assert [(task.name, task.group, task.several) for task in tasks] == [
        ("ChartQA-human", "human", True),
        ("ChartQA-machine", "machine", False),
    ]
    [first], [second] = map(samples, tasks)
    assert accepted_answers(first, 0) == ("7", "seven")
    assert first.images[0].mode == "RGB"
    assert len(second.images) == 2
    with pytest.raises(ConfigError, match="no column 'question'"):
        read_data("someone/ChartQA")
    with pytest.raises(ConfigError, match=r"Unknown option 'splt=val'.*Did you mean 'split'"):
        read_data("someone/ChartQA:splt=val")


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*given: Any, **options: Any) -> Table:
        raise FileNotFoundError("Dataset 'someone/x' doesn't exist on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(LoadError, match="Cannot load the data set 'someone/x', split 'test': Dataset"):
        read_data("someone/x")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'plphp\[eval\]'"):
        read_data("someone/ChartQA")
    with pytest.raises(LoadError, match=r"neither a \.jsonl file nor a folder"):
        read_data(str(tmp_path / "missing.jsonl"))
