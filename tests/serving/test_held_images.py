# SPDX-License-Identifier: Apache-2.0
"""A conversation sends what is new: images that were read have no source, and no limit counts them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from chat_client import Client, Talk, serving, user
from PIL import Image

import tiny_hub
from plphp import PLPHPConfig
from plphp.serving import chat_messages
from plphp.serving.options import Limits
from tiny_models import TIERS

SCREENSHOTS = 40
HELD = {"type": "image_url", "image_url": {"url": "held:"}}
LIMITS = Limits(conversations=4, max_images=2, max_body_bytes=100_000)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    config = PLPHPConfig.parse("quantized:tiers=r4,vision_budget=64 tokens")
    model = TIERS["llava"].build().float()
    model.config.text_config.max_position_embeddings = 32_768
    with serving(model, tiny_hub.processor(), config, LIMITS) as (client, _):
        yield client


def screen(number: int) -> Image.Image:
    """A picture that differs from others."""
    return Image.new("RGB", (8, 8), (number % 256, number // 256, 100))


def hold(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its images as held."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [part if part["type"] == "text" else HELD for part in message["content"]]}


def begun(client: Client, *numbers: int) -> Talk:
    talk = Talk(client)
    talk.ask(user("a", [screen(number) for number in numbers]), max_tokens=2)
    return talk


def test_an_agent_goes_on_for_more_screenshots_than_a_request_may_have(client: Client) -> None:
    talk = Talk(client)
    for number in range(SCREENSHOTS):
        reply = talk.ask(user(f"{number}", [screen(number)]), max_tokens=1, ignore_eos=True)
        talk.chat = [hold(message) for message in talk.chat]
        assert reply["plphp"]["vision_tokens"] == tiny_hub.IMAGE_TOKENS
    images = talk.card()["images"]
    assert [image["turn"] for image in images] == list(range(1, SCREENSHOTS + 1))
    assert sum(image["nbytes"] for image in images) <= 4 * images[0]["whole_bytes"]


def test_old_images_are_compared_and_not_decoded(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were sent, as the same file in another URI, and as held; the answers are the same."""
    decoded: list[Any] = []
    load = chat_messages.load_image

    def noted(source: Any, **how: Any) -> Any:
        decoded.append(source)
        return load(source, **how)

    talk = begun(client, 1, 2)
    chat = talk.chat
    sent = chat[0]["content"]
    uris = [part["image_url"]["url"] for part in sent[:2]]
    again = [uri.replace("image/png", "image/PNG") for uri in uris]
    assert again != uris
    parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in again]
    for own in (sent, [*parts, sent[2]], [parts[0], HELD, sent[2]], [HELD, HELD, sent[2]]):
        talk = begun(client, 1, 2)
        monkeypatch.setattr(chat_messages, "load_image", noted)
        talk.chat = [{"role": "user", "content": own}, talk.chat[1]]
        talk.ask(user("b", [screen(3)]), max_tokens=2)
        monkeypatch.undo()
    assert len(decoded) == 4


def test_what_is_refused_changes_nothing(client: Client) -> None:
    talk = begun(client, 1, 2)
    held, answer = hold(talk.chat[0]), talk.chat[1]
    other = user("a", [screen(1), screen(3)])
    address = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    before = talk.card()
    histories: list[tuple[list[dict[str, Any]], str]] = [
        ([other, answer, user("b")], "Message 1 of the chat differs from what was read in this conversation: send"),
        ([held, {**answer, "content": "no"}, user("b")], "differs from the answer that this server gave: send the"),
        ([{**held, "content": [*held["content"][:1], held["content"][2]]}, answer, user("b")], "Message 1 of the"),
        ([{**held, "content": [HELD, address, held["content"][2]]}, answer, user("b")], "Message 1 of the chat"),
        ([held, {"role": "assistant", "content": [HELD]}, user("b")], "Message 2 of the chat differs"),
        ([held, answer, hold(user("b", [screen(1)]))], r"Message 3 of the chat, part 1: this image is said to be held"),
        ([held, answer, user("b", [screen(1)] * 3)], "has 3 new images, and this server reads 2 at most"),
    ]
    for history, part in histories:
        talk.chat = []
        status, text = talk.refused(*history)
        assert (status, part in text) == (400, True), text
        assert talk.card() == before
    talk.chat = [held, answer]
    assert talk.ask(user("b", [screen(3)] * 2), max_tokens=2)["plphp"]["vision_tokens"] == 2 * tiny_hub.IMAGE_TOKENS


@pytest.mark.parametrize("plphp", [{}, {"plphp": {"conversation": "new"}}], ids=["alone", "new"])
def test_without_a_conversation_nothing_is_held(client: Client, plphp: dict[str, Any]) -> None:
    status, reply = client.post({"messages": [hold(user("a", [screen(1)]))], **plphp})
    assert status == 400
    assert "Message 1 of the chat, part 1: this image is said to be held" in reply["error"]["message"]


def test_a_source_that_is_not_the_image(client: Client) -> None:
    """Broken base64 in the place of an image that was read is another image."""
    talk = begun(client, 1)
    wrong = f"data:image/png;base64,{base64.b64encode(b'no').decode()}"
    for url in (wrong, "data:image/png;base64,!", "data:text/plain,a"):
        talk.chat[0]["content"][0] = {"type": "image_url", "image_url": {"url": url}}
        assert talk.refused(user("b"))[0] == 400
