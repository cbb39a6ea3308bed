# SPDX-License-Identifier: Apache-2.0
"""The user's own data: files, folders, and what the ``datasets`` library loads."""

from __future__ import annotations

import base64
import builtins
import json
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import tiny_hub
from plphp.errors import BackendUnavailableError, ConfigError, LoadError
from plphp.evaluation import EvalSettings
from plphp.evaluation.running.task_choice import mode_of, resolve_tasks
from plphp.evaluation.tasks.datasets import DataTask, read_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        tiny_hub.picture(tmp_path / name)
    return tmp_path


def write(file: Path, *lines: Any) -> str:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(file)


def samples(task: DataTask) -> list[Any]:
    return [make() for make in task.sample_makers("dev", 100)]


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
        {"image": "b.png", "question": "What?", "answer": "A cross."},
    )
    [task] = read_data(path, "contains")
    assert (task.name, task.group, task.metric, task.several) == ("mine", "data", "contains", True)
    first, second, third = samples(task)
    assert (first.id, third.id) == ("mine-1", "mine-4")
    assert first.turns[0].answer == "A star."
    assert first.accepted_answers(0) == ("A star.",)
    assert (second.id, second.system, len(second.images)) == ("x", "Hi.", 2)
    assert second.accepted_answers(0) == ("2", "two")
    assert len(task.sample_makers("test", 1)) == 1


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
    [single] = read_data(write(folder / "one.jsonl", {**line, "answer": "x"}))
    [several] = read_data(write(folder / "two.jsonl", {**line, "answers": ["x", "y"]}))
    assert [mode_of(single, "auto"), mode_of(several, "auto")] == ["verify", "decode"]
    with pytest.raises(ConfigError, match="'two' cannot be verified"):
        mode_of(several, "verify")


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


def stored(image: Image.Image) -> dict[str, Any]:
    """An image as the ``datasets`` library stores it."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


class Table:
    """As much of a data set of the ``datasets`` library as is used; its images are not to be decoded by it."""

    def __init__(self, rows: Sequence[dict[str, Any]], arrow: bool = False) -> None:
        self.rows, self.arrow = rows, arrow

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0])

    def select_columns(self, names: list[str]) -> Table:
        return Table([{name: row[name] for name in names} for row in self.rows], self.arrow)

    def with_format(self, kind: str) -> Table:
        return Table(self.rows, kind == "arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if self.arrow:
            return {name: [SimpleNamespace(as_py=lambda cell=cell: cell)] for name, cell in self.rows[row].items()}
        if "image" in self.rows[row]:
            raise OSError("broken data stream when reading image file")
        return self.rows[row]


CHARTS = (
    {"image": stored(Image.new("L", (9, 9))), "query": "What?", "label": ["7", "seven"], "kind": "human"},
    {"image": [stored(Image.new("RGB", (9, 9)))] * 2, "query": "Who?", "label": "me", "kind": "machine"},
)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Table:
        asked.append((arguments, options))
        return Table(CHARTS)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    tasks = read_data("someone/ChartQA:split=val,question=query,answer=label,group=kind,name=small", "relaxed_accuracy")
    assert asked == [(("someone/ChartQA", "small"), {"split": "val"})]
    assert [(task.name, task.group, task.several) for task in tasks] == [
        ("ChartQA-human", "human", True),
        ("ChartQA-machine", "machine", False),
    ]
    [first], [second] = map(samples, tasks)
    assert first.accepted_answers(0) == ("7", "seven")
    assert first.images[0].mode == "RGB"
    assert len(second.images) == 2
    with pytest.raises(ConfigError, match="no column 'question'"):
        read_data("someone/ChartQA")
    with pytest.raises(ConfigError, match=r"Unknown option 'splt=val'.*Did you mean 'split'"):
        read_data("someone/ChartQA:splt=val")


def load_cells(monkeypatch: pytest.MonkeyPatch, source: str, cells: list[Any], **more: Any) -> Any:
    rows = [{"image": cell, "question": "What?", "answer": "x"} for cell in cells]
    library = SimpleNamespace(load_dataset=lambda *args, **options: Table(rows))
    monkeypatch.setitem(sys.modules, "datasets", library)
    [task] = read_data(source, **more)
    return task


@pytest.mark.parametrize("as_list", [False, True])
def test_cells_of_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_list: bool) -> None:
    """Bytes, and paths relative to the file, through the one reader: upright, and over white."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png", exif=exif)
    content = (tmp_path / "clear.png").read_bytes()
    (tmp_path / "data.parquet").write_bytes(b"")
    cells = [
        {"bytes": content, "path": "none.png"},
        {"bytes": None, "path": "clear.png"},
        "clear.png",
        content,
        f"data:image/png;base64,{base64.b64encode(content).decode()}",
    ]
    cells = [[cell] * 2 for cell in cells] if as_list else cells
    task = load_cells(monkeypatch, str(tmp_path / "data.parquet"), cells)
    for sample in samples(task):
        assert [image.size for image in sample.images] == [(4, 6)] * (2 if as_list else 1)
        assert all(image.getcolors() == [(24, (255, 255, 255))] for image in sample.images)


@pytest.mark.parametrize(
    ("cell", "part"),
    [
        ({"bytes": b"hello", "path": "a.png"}, r"The file a\.png is not an image"),
        (b"hello", "The file of 5 bytes is not an image"),
        (None, "Expected an image, got None"),
        ([], "no image in the column 'image'"),
        ("none.png", r"There is no image file none\.png"),
        ({"bytes": None, "path": None}, "Expected an image, got None"),
        ({"src": "QUJD" * 100}, "Unknown key 'src' of the image"),
        (f"data:text/html;base64,{'QUJD' * 100}", ".* is of the media type 'text/html'"),
        ("https://images.test/a.png", ".* unless it is allowed"),
        (stored(Image.new("L", (2, 2))) | {"path": 3, "extra": 1}, "Unknown key 'extra'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_broken_cell_is_named_with_its_row(
    monkeypatch: pytest.MonkeyPatch, folder: Path, cell: Any, part: str
) -> None:
    """When its sample is made, and without harm to the others."""
    task = load_cells(monkeypatch, "someone/pictures", [folder / "a.png", cell, folder / "b.png"])
    assert task.makers[0]().images[0].mode == task.makers[2]().images[0].mode == "RGB"
    with pytest.raises(LoadError, match=f"someone/pictures, row 1: {part}") as caught:
        task.makers[1]()
    assert "QUJD" * 20 not in str(caught.value)


def test_a_row_that_the_library_cannot_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "with_format", lambda self, kind: self)
    task = load_cells(monkeypatch, "someone/pictures", ["a.png"])
    with pytest.raises(LoadError, match="someone/pictures, row 0: cannot read the image: broken data stream"):
        task.makers[0]()


def test_lines_with_images_of_every_kind(folder: Path) -> None:
    uri = f"data:image/png;base64,{base64.b64encode((folder / 'a.png').read_bytes()).decode()}"
    ask = {"question": "What?", "answer": "x"}
    lines = [
        {"image": uri, **ask},
        {"images": [{"type": "image_url", "image_url": {"url": uri}}, "file:a.png"], **ask},
        {"file_name": "a.png", "image": None, **ask},
    ]
    file = folder / "mine.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode())
    [task] = read_data(str(file))
    with Image.open(folder / "a.png") as image:
        expected = image.tobytes()
    assert [len(sample.images) for sample in samples(task)] == [1, 2, 1]
    assert all(image.tobytes() == expected for sample in samples(task) for image in sample.images)
    assert [sample.id for sample in samples(task)] == ["mine-1", "mine-2", "mine-3"]


def test_a_broken_image_is_named_with_its_line(folder: Path) -> None:
    ask = {"question": "What?", "answer": "x"}
    path = write(folder / "mine.jsonl", {"image": "a.png", **ask}, "", {"images": ["a.png", "b.png"], **ask})
    [task] = read_data(path)
    (folder / "b.png").write_bytes(b"hello")
    assert len(task.makers[0]().images) == 1
    with pytest.raises(LoadError, match=r"mine\.jsonl, line 3: The file .*b\.png is not an image"):
        task.makers[1]()


def test_an_image_that_is_not_there_costs_its_sample(folder: Path) -> None:
    ask = {"question": "What?", "answer": "x"}
    names = ("a.png", "nope.png", "https://images.test/a.png")
    [task] = read_data(write(folder / "mine.jsonl", *({"image": name, **ask} for name in names)))
    assert len(task.makers[0]().images) == 1
    for maker, message in zip(
        task.makers[1:], ("line 2: There is no image file", "line 3: .* is an address"), strict=True
    ):
        with pytest.raises(LoadError, match=message):
            maker()


def test_addresses_in_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder / "mine.jsonl", {"image": "https://images.test/a.png", "question": "What?", "answer": "x"})
    with pytest.raises(LoadError, match=r"line 1: https://images\.test/a\.png is an address"):
        read_data(path)
    asked = []
    monkeypatch.setattr("plphp.inputs.media.fetch", lambda at: asked.append(at.url) or (folder / "a.png").read_bytes())
    [task] = read_data(path, allow_urls=True)
    assert asked == []
    task.makers[0]()
    cells = load_cells(monkeypatch, "someone/pictures", ["https://images.test/b.png"], allow_urls=True)
    cells.makers[0]()
    assert asked == ["https://images.test/a.png", "https://images.test/b.png"]


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> Table:
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
