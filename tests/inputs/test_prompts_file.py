# SPDX-License-Identifier: Apache-2.0
"""Prompts from files: what is read, and what is said of a file that is wrong."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_hub
from plphp import SpanError
from plphp.errors import LoadError
from plphp.inputs.prompts_file import Prompt, prompt_inputs, read_prompts

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "images" / "questions.json"
TURNS = [
    {"role": "user", "content": [{"type": "image", "path": "b.png"}, {"type": "text", "text": "one"}]},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "three"}]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images in a folder of their own."""
    (tmp_path / "images").mkdir()
    tiny_hub.picture(tmp_path / "images" / "a.png")
    tiny_hub.picture(tmp_path / "b.png", seed=9)
    return tmp_path


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("values", "answers"),
    [
        ({}, ()),
        ({"answer": "a"}, ("a",)),
        ({"answers": ["a", "b"]}, ("a", "b")),
        ({"answer": 3}, ()),
        ({"answer": None}, ()),
    ],
    ids=str,
)
def test_right_answers(folder: Path, values: dict[str, Any], answers: tuple[str, ...]) -> None:
    """Where they are no text they are left out: most commands read none."""
    path = write(folder, {"images": ["b.png"], "question": "a?", **values})
    assert [prompt.answers for prompt in read_prompts(path)] == [answers]


@pytest.mark.parametrize("name", ["video", "videos"])
@pytest.mark.parametrize("images", [{}, {"images": ["b.png"]}], ids=["alone", "beside images"])
def test_a_video_is_not_left_out_silently(folder: Path, name: str, images: dict[str, Any]) -> None:
    path = write(folder, {name: ["clip.gif"], "question": "a?", **images})
    with pytest.raises(LoadError, match=f"line 1: '{name}' is not read .* frames as \"images\""):
        read_prompts(path)
    assert len(read_prompts(write(folder, {name: None, "question": "a?", "images": ["b.png"]}))) == 1


def test_lines_are_read(folder: Path) -> None:
    question = {"images": ["images/a.png", "b.png"], "question": "a\u2028b?", "answer": "c"}
    path = write(folder, json.dumps(question, ensure_ascii=False), "", {"images": ["b.png"], "turns": TURNS})
    first, second = read_prompts(path)
    assert first == Prompt((folder / "images/a.png", folder / "b.png"), "a\u2028b?", None, f"{path}, line 1", ("c",))
    assert second.origin == f"{path}, line 3"
    assert second.turns is not None
    assert second.turns[0]["content"][0]["image"] == folder / "b.png"


def test_a_json_list_is_read() -> None:
    prompts = read_prompts(EXAMPLES)
    values = json.loads(EXAMPLES.read_text())
    assert [prompt.question for prompt in prompts] == [value["question"] for value in values]
    assert [len(prompt.images) for prompt in prompts] == [len(value["images"]) for value in values]


def test_inputs_are_made_when_they_are_asked_for(folder: Path) -> None:
    path = write(
        folder,
        {"images": ["images/a.png", "b.png"], "question": "a?"},
        {"images": ["images/a.png"], "turns": TURNS},
        {"images": ["b.png"], "question": "<image> and <image>?"},
    )
    inputs = prompt_inputs(tiny_hub.processor(), read_prompts(path))
    for _ in range(2):
        assert next(inputs)["pixel_values"].shape[0] == 2
    with pytest.raises(SpanError, match=r"line 3: The prompt has 2 image slot\(s\), but 1"):
        next(inputs)


def test_images_under_any_name(folder: Path) -> None:
    """Those that are paths are relative to the file; with a byte order mark and the line ends of Windows."""
    uri = f"data:image/png;base64,{base64.b64encode((folder / 'b.png').read_bytes()).decode()}"
    lines = [
        {"images": ["b.png"], "question": "a?"},
        {"image": "b.png", "question": "a?"},
        {"file_name": "b.png", "question": "a?", "images": None},
        {"images": [uri], "question": "a?"},
        {"images": [{"type": "image_url", "image_url": {"url": "file:b.png"}}], "question": "a?"},
        {"turns": [{"role": "user", "content": [{"image_url": {"url": uri}}, {"type": "text", "text": "a?"}]}]},
        {"turns": [{"role": "user", "content": [{"image": "b.png"}, {"text": "a?"}]}]},
    ]
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode())
    first, *rest = prompt_inputs(tiny_hub.processor(), read_prompts(path))
    assert len(rest) == 6
    for inputs in rest:
        assert all(torch.equal(inputs[name], first[name]) for name in first)


def test_addresses_are_fetched_when_they_are_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://images.test/a.png"
    asked_about = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "a?"}]
    turns = [{"role": "user", "content": asked_about}]
    path = write(folder, {"images": [address], "question": "a?"}, {"turns": turns})
    with pytest.raises(LoadError, match=r"line 1: https://images\.test/a\.png is an address.* unless it is allowed"):
        read_prompts(path)
    asked = []
    monkeypatch.setattr("plphp.inputs.media.fetch", lambda at: asked.append(at.url) or (folder / "b.png").read_bytes())
    inputs = prompt_inputs(tiny_hub.processor(), read_prompts(path, allow_urls=True))
    assert asked == []
    assert len(list(inputs)) == 2
    assert asked == [address, address]


@pytest.mark.parametrize(
    "line",
    [
        {"images": ["images/a.png"], "question": "a?"},
        {"turns": [{"role": "user", "content": [{"image": "images/a.png"}]}]},
    ],
)
def test_a_broken_image_is_named_with_its_line(folder: Path, line: Any) -> None:
    prompts = read_prompts(write(folder, {"images": ["b.png"], "question": "a"}, "", line))
    (folder / "images" / "a.png").write_bytes(b"hello")
    inputs = prompt_inputs(tiny_hub.processor(), prompts)
    next(inputs)
    with pytest.raises(LoadError, match=r"prompts\.jsonl, line 3: .*a\.png is not an image"):
        next(inputs)
    if prompts[1].question:
        with pytest.raises(LoadError, match=r"prompts\.jsonl, line 3: .*a\.png is not an image"):
            prompts[1].read_images()


@pytest.mark.parametrize(
    "line",
    [
        {"images": [f"data:text/html;base64,{'QUJD' * 200}"], "question": "a"},
        {"images": ["b.png"], "question": ["QUJD" * 200]},
        {"images": [{"uri": "QUJD" * 200}], "question": "a"},
        {"images": [["QUJD" * 200]], "question": "a"},
        {"turns": "QUJD" * 200},
        ["QUJD" * 200],
    ],
)
def test_an_image_is_not_repeated_in_full(folder: Path, line: Any) -> None:
    with pytest.raises(LoadError, match=r"prompts\.jsonl, line 2: .*(\d+ characters\)|Unknown key 'uri')") as caught:
        read_prompts(write(folder, {"images": ["b.png"], "question": "a"}, line))
    assert "QUJD" * 15 not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2: not JSON"),
        ("3", 'line 2: expected an object with "question" and "images", got 3'),
        ({"images": ["b.png"]}, 'line 2: expected either "question" or "turns", got images'),
        ({}, "got nothing"),
        ({"images": ["b.png"], "question": "a", "turns": []}, 'either "question" or "turns"'),
        ({"images": ["b.png"], "question": ["a"]}, '"question" must be text'),
        ({"images": ["b.png"], "question": " "}, '"question" must be text'),
        ({"question": "a"}, 'line 2: "images" is missing'),
        ({"images": [1], "question": "a"}, r"line 2: Expected an image, got 1 \(int\)"),
        ({"images": [], "question": "a"}, '"images" is missing or empty'),
        ({"images": ["b.png"], "image": "b.png", "question": "a"}, "named twice, by 'images' and 'image'"),
        ({"images": ["none.png"], "question": "a"}, "line 2: There is no image file .*none.png"),
        ({"turns": []}, '"turns" must be a list of messages'),
        ({"turns": "a"}, '"turns" must be a list of messages'),
        ({"turns": [{"role": "user"}]}, "line 2: The content of message 1"),
        (
            {"turns": [{"role": "user", "content": [{"type": "image", "path": "c.png"}]}]},
            "line 2: Message 1 of the chat, part 1: There is no image file .*c.png",
        ),
    ],
)
def test_a_wrong_line_is_named(folder: Path, line: Any, part: str) -> None:
    with pytest.raises(LoadError, match=part):
        read_prompts(write(folder, {"images": ["b.png"], "question": "a"}, line))


def test_a_wrong_file(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"none\.jsonl: No such file"):
        read_prompts(folder / "none.jsonl")
    with pytest.raises(LoadError, match="not UTF-8"):
        read_prompts(folder / "b.png")
    with pytest.raises(LoadError, match="holds no prompts"):
        read_prompts(write(folder, "", ""))
    with pytest.raises(LoadError, match="holds no prompts"):
        read_prompts(write(folder, "[]"))
    with pytest.raises(LoadError, match="neither JSON Lines nor a JSON list"):
        read_prompts(write(folder, "[{]"))
    with pytest.raises(LoadError, match="entry 2: expected an object"):
        read_prompts(write(folder, '[{"question": "a", "images": ["b.png"]}, 1]'))
