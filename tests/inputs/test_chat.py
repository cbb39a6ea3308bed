# SPDX-License-Identifier: Apache-2.0
"""Chats as transformers and OpenAI's clients write them: each part is understood, or is an error that names it."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny_hub
from plphp.errors import ConfigError, LoadError, PLPHPError, SpanError, UnsupportedFeatureError
from plphp.inputs.chat import chat_in, normalized, read_chat
from plphp.inputs.fetching import WebAddress
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PICTURE, SECOND = (Image.effect_noise((40, 24), 90).convert("RGB") for _ in range(2))
TEXT = base64.b64encode(png(PICTURE)).decode()
URI = f"data:image/png;base64,{TEXT}"
ASK = {"type": "text", "text": "What?"}


def chat(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_hub.processor()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PICTURE.save(tmp_path / "a.png")
    SECOND.save(tmp_path / "b.png")
    return tmp_path


KEYS = [
    {"type": "image", "path": "a.png"},
    {"type": "image", "url": "a.png"},
    {"type": "image", "image": "a.png"},
    {"type": "image", "url": "file:a.png"},
    {"type": "image_url", "image_url": {"url": "a.png"}},
    {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
    {"type": "image_url", "image_url": "a.png"},
    {"image": "a.png"},
    {"image_url": {"url": "a.png"}},
    {"type": "image", "image": {"path": "a.png"}},
    {"type": "image", "path": "a.png", "text": None, "url": None},  # as a table stores parts of two kinds
]


@pytest.mark.parametrize("part", KEYS, ids=str)
def test_paths_under_any_key_are_relative_to_the_file(folder: Path, part: dict[str, Any]) -> None:
    path = folder / "chat.json"
    path.write_text(json.dumps(chat(part, {"type": "text", "text": "What?", "image": None})))
    assert read_chat(path) == chat({"type": "image", "image": folder / "a.png"}, ASK)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": URI},
        {"type": "image", "url": URI},
        {"type": "image", "image": URI},
        {"type": "image", "base64": TEXT},
        {"type": "image", "image": TEXT},
        {"type": "image", "image": PICTURE},
        {"type": "image", "image": PICTURE.convert("RGBA")},
        {"type": "image", "bytes": png(PICTURE), "path": "none.png"},
        {"type": "image"},
    ],
    ids=lambda part: str(part)[:60],
)
def test_every_part_is_the_same_image(processor: Any, part: dict[str, Any]) -> None:
    images = [PICTURE] if part == {"type": "image"} else []
    kept = repr(part)
    inputs = build_inputs(processor, messages=chat(part, ASK), images=images)
    expected = build_inputs(processor, "What?", images=[PICTURE])
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert repr(part) == kept


def test_images_of_a_chat_are_in_order(processor: Any, folder: Path) -> None:
    (folder / "chat.json").write_text(
        json.dumps([*chat({"type": "image_url", "image_url": URI}, ASK), {"role": "assistant", "content": "A."}])[:-1]
        + ", "
        + json.dumps(chat({"type": "image"}, {"type": "image", "path": "b.png"}))[1:]
    )
    inputs = build_inputs(processor, messages=read_chat(folder / "chat.json"), images=[folder / "a.png"])
    expected = build_inputs(processor, "a", images=[PICTURE, PICTURE, SECOND])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


MESSAGE = "Message 2 of the chat, part 2: "
REFUSED: dict[str, tuple[Any, str]] = {
    "sound": ({"type": "audio", "audio": "a.wav"}, "plphp knows no \"type\" 'audio'"),
    "Responses API": ({"type": "input_image", "image_url": URI}, "knows no \"type\" 'input_image'"),
    "typo of a type": ({"type": "imgae", "path": "a.png"}, "'imgae', got .* Did you mean 'image'"),
    "type of no text": ({"type": ["image"]}, "knows no \"type\" \\['image'\\]"),
    "nothing": ({}, 'knows no "type" None, got {}'),
    "no known key": ({"source": URI}, 'knows no "type" None'),
    "typo of a key": ({"type": "image", "paht": "a.png"}, "Unknown key 'paht' of the image. Did you mean 'path'"),
    "unknown key": ({"type": "image", "path": "a.png", "max_pixels": 9}, "Unknown key 'max_pixels' of the image"),
    "path and url": ({"type": "image", "path": "a.png", "url": URI}, "The image is named twice, by 'path' and 'url'"),
    "text of an image": ({"type": "image", "path": "a.png", "text": "a"}, "Unknown key 'text' of the image"),
    "image of a text": ({"type": "text", "text": "a", "image": URI}, 'expected {"type": "text", "text": ...}, got'),
    "text without text": ({"type": "text"}, 'expected {"type": "text", "text": ...}, got'),
    "text of no text": ({"type": "text", "text": [URI]}, 'expected {"type": "text", "text": ...}, got'),
    "content in the place of text": ({"type": "text", "content": "a"}, 'expected {"type": "text"'),
    "no address": ({"type": "image_url"}, "'image_url' is missing, got"),
    "empty address": ({"type": "image_url", "image_url": {}}, "'image_url' must be"),
    "less detail": ({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}, "The detail 'low'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_part_that_is_not_understood_is_named(processor: Any, tmp_path: Path, case: str) -> None:
    part, said = REFUSED[case]
    messages = [{"role": "system", "content": "Be brief."}, *chat(ASK, part, {"type": "image", "image": PICTURE})]
    with pytest.raises(ConfigError, match=said) as caught:
        build_inputs(processor, messages=messages)
    message = str(caught.value)
    assert message.startswith(MESSAGE)
    assert len(message) < 500
    assert TEXT[60:120] not in message
    (tmp_path / "chat.json").write_text(json.dumps([*messages[:1], *chat(ASK, part)]))
    with pytest.raises(LoadError, match=rf"The chat .*chat\.json: {MESSAGE}"):
        read_chat(tmp_path / "chat.json")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("none.png", "There is no image file none.png"),
        (b"hello", "The file of 5 bytes is not an image"),
        (URI[:600], "is broken"),
        (f"data:text/html;base64,{TEXT}", "media type 'text/html'"),
        ("https://images.test/a.png", "unless it is allowed"),
        (3, "Expected an image, got 3"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(processor: Any, source: Any, said: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat(ASK, {"type": "image", "image": source})]
    with pytest.raises(LoadError, match=f"{MESSAGE}.*{said}") as caught:
        build_inputs(processor, messages=messages)
    assert TEXT[60:120] not in str(caught.value)


@pytest.mark.parametrize(
    "messages",
    [
        [f"![](a) {URI}"],
        [{"role": 1, "content": URI}],
        [{"content": [{"type": "image", "image": URI}]}],
        [{"role": "user", "content": {"type": "image", "image": URI}}],
        [{"role": "user", "content": [URI]}],
        [{"role": "user", "content": None, "image": URI}],
    ],
)
def test_a_message_is_not_repeated_in_full(messages: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?i)message 1 of the chat must be") as caught:
        normalized(messages)
    assert TEXT[60:120] not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_are_looked_for_when_the_chat_is_read(folder: Path) -> None:
    path = folder / "chat.json"
    path.write_text(json.dumps(chat({"type": "image", "path": "a.png"}, {"image_url": "c.png"})))
    with pytest.raises(LoadError, match=r"chat\.json: Message 1 of the chat, part 2: There is no image file .*c\.png"):
        read_chat(path)
    path.write_text(json.dumps(chat({"type": "image_url", "image_url": {"url": "https://images.test/a.png"}})))
    with pytest.raises(LoadError, match="unless it is allowed"):
        read_chat(path)
    [message] = read_chat(path, allow_urls=True)
    assert message["content"] == [{"type": "image", "image": WebAddress("https://images.test/a.png")}]


def test_a_chat_with_leave_to_fetch_keeps_it(processor: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("plphp.inputs.media.fetch", lambda address: asked.append(address.url) or png(PICTURE))
    messages = chat({"type": "image", "url": "https://images.test/a.png"}, ASK)
    expected = build_inputs(processor, "What?", images=[PICTURE])
    for inputs in (
        build_inputs(processor, messages=chat_in(folder, messages, allow_urls=True)),
        build_inputs(processor, messages=messages, allow_urls=True),
        build_inputs(processor, "What?", images=["https://images.test/a.png"], allow_urls=True),
    ):
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert asked == ["https://images.test/a.png"] * 3


def test_images_of_a_prompt_are_brought_to_one_form(processor: Any, folder: Path) -> None:
    """Upright, over white, eight bits: not what an image processor makes of them."""
    clear = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    turned = PICTURE.copy()
    turned.getexif()[0x0112] = 6
    deep = PICTURE.convert("L").convert("I").point(lambda value: value * 257)
    for image in (clear, turned, deep, folder / "a.png", png(clear)):
        inputs = build_inputs(processor, "What?", images=[image])
        assert torch.equal(
            inputs["pixel_values"], build_inputs(processor, "What?", images=[load_image(image)])["pixel_values"]
        )
    white = build_inputs(processor, "What?", images=[Image.new("RGB", (40, 24), "white")])["pixel_values"]
    assert torch.equal(build_inputs(processor, "What?", images=[clear])["pixel_values"], white)


@pytest.mark.parametrize("images", [PICTURE, "a.png", Path("a.png"), b"a", {"path": "a.png"}, 3, None])
def test_images_are_a_list(processor: Any, images: Any) -> None:
    with pytest.raises(ConfigError, match="images must be a list, got"):
        build_inputs(processor, "What?", images=images)


class Films:
    """As much of a processor that takes videos as is used."""

    image_token, video_token, video_processor = "<i>", "<v>", object()
    tokenizer = None
    chat_template = "a"

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        parts = [part for message in messages for part in message["content"]]
        assert all(set(part) == ({"type", "text"} if part["type"] == "text" else {"type"}) for part in parts)
        return "".join({"image": "<i>", "video": "<v>"}.get(part["type"], "") for part in parts)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        return inputs


VIDEOS = [
    {"type": "video", "path": "film"},
    {"type": "video", "url": "film"},
    {"type": "video", "video": "film"},
    {"type": "video_url", "video_url": {"url": "film"}},
    {"video": "film"},
    {"type": "video", "video": ["film/0.png", "film/1.png", {"path": "film/2.png"}]},
]


@pytest.mark.parametrize("part", VIDEOS, ids=str)
def test_videos(tmp_path: Path, part: dict[str, Any]) -> None:
    (tmp_path / "film").mkdir()
    for index in range(3):
        Image.new("RGB", (4, 4), (index,) * 3).save(tmp_path / "film" / f"{index}.png")
    (tmp_path / "chat.json").write_text(json.dumps(chat(part, {"type": "video"}, {"type": "image", "image": URI}, ASK)))
    film = [Image.new("RGBA", (4, 4), (0, 0, 0, 0))]
    inputs = build_inputs(Films(), messages=read_chat(tmp_path / "chat.json"), videos=[film], frames=4)
    read, passed = inputs["videos"]
    assert [frame.getpixel((0, 0))[0] for frame in read] == [0, 1, 2]
    assert [frame.getpixel((0, 0)) for frame in passed] == [(255, 255, 255)]
    assert len(inputs["images"][0]) == 1
    if isinstance(part.get("video"), str):
        inputs = build_inputs(Films(), messages=read_chat(tmp_path / "chat.json"), videos=[film], frames=1)
        read = inputs["videos"][0]
        assert [frame.getpixel((0, 0))[0] for frame in read] == [1]


def test_videos_that_are_refused(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="takes no videos: give some of its frames"):
        build_inputs(processor, messages=chat({"type": "video", "path": "film"}))
    for part, error, said in (
        ({"type": "video"}, SpanError, "more video entries without a path than the 0 videos"),
        ({"type": "video", "path": "none.mp4"}, LoadError, r"part 1: There is no video none\.mp4"),
        ({"type": "video", "url": "https://films.test/a.mp4"}, LoadError, "plphp reads videos from files alone"),
        ({"type": "video", "base64": TEXT}, ConfigError, "Unknown key 'base64' of the video"),
        ({"type": "video", "video": []}, LoadError, "Expected a video, a path or a list of frames"),
        ({"type": "video", "video": 3}, LoadError, "Expected a video, a path or a list of frames, got 3"),
        ({"type": "video", "fps": 3, "path": "a"}, ConfigError, "Unknown key 'fps' of the video"),
    ):
        with pytest.raises(error, match=said) as caught:
            build_inputs(Films(), messages=chat(part))
        assert isinstance(caught.value, PLPHPError)
        if error is LoadError:
            (tmp_path / "chat.json").write_text(json.dumps(chat(part)))
            with pytest.raises(LoadError, match=r"chat\.json: Message 1 of the chat, part 1"):
                build_inputs(Films(), messages=read_chat(tmp_path / "chat.json"))
    with pytest.raises(SpanError, match="no video slot for 1 of the 1 videos"):
        build_inputs(Films(), messages=chat(ASK), videos=[[PICTURE]])
    with pytest.raises(ConfigError, match="videos must be a list"):
        build_inputs(Films(), messages=chat({"type": "video"}), videos=tmp_path)


@pytest.mark.parametrize("content", [[{"type": "image"}], [{"type": "image"}, {"type": "text", "text": " "}]])
def test_a_chat_without_text_is_refused(content: Any) -> None:
    with pytest.raises(ConfigError, match="The chat has no text"):
        build_inputs(tiny_hub.processor(), messages=[{"role": "user", "content": content}], images=[PICTURE])


def test_an_empty_chat_is_refused() -> None:
    with pytest.raises(ConfigError, match="The chat holds no messages"):
        normalized([])
