# SPDX-License-Identifier: Apache-2.0
"""Images of conversations under a budget, with the bundled model: shown as they fade, forgotten and restored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from chat_client import Client, Talk, serving, user

from plphp import PLPHPConfig
from plphp.engines.hf import memory_cache
from plphp.inputs.loading import load_model
from plphp.serving.options import Limits

LIMITS = Limits(conversations=8)
FIRST = user("What is in row 1?", ["grid-1.png"])
SECOND = user("What is in row 2 of the second?", ["grid-2.png", "trio-1.png"])
LAST = user("And in row 3 of it?")


def served(settings: str) -> Iterator[Client]:
    with serving(*load_model(None), PLPHPConfig.parse(settings), LIMITS) as (client, _):
        yield client


@pytest.fixture(scope="module")
def tight() -> Iterator[Client]:
    yield from served("query_bank:bank=bundled,tiers=t10,vision_budget=40 tokens")


@pytest.fixture(scope="module")
def roomy() -> Iterator[Client]:
    yield from served("none:vision_budget=1GB")


def change(talk: Talk, image: object, content: Any = None) -> tuple[int, Any]:
    """Restore an image with the parts of a message, or with () without any; without anything, forget it."""
    path = f"/v1/conversations/{talk.name}/images/{image}"
    if content is None:
        status, page = talk.client.get(path, "DELETE")
    else:
        status, page = talk.client.get(f"{path}/restore", "POST", None if content == () else {"content": content})
    reply = json.loads(page)
    return status, reply if status == 200 else reply["error"]["message"]


def talked(client: Client, *questions: dict[str, Any]) -> Talk:
    talk = Talk(client)
    for question in questions or (FIRST, SECOND):
        talk.ask(question, max_tokens=24)
    return talk


@pytest.fixture(scope="module")
def two_read(tight: Client) -> Talk:
    """A conversation of two questions."""
    return talked(tight)


def test_what_is_held_is_shown_and_comes_back(tight: Client) -> None:
    talk = talked(tight)
    images = talk.card()["images"]
    budget = 40 * images[0]["whole_bytes"] / 196
    assert [(image["number"], image["turn"], image["tokens"]) for image in images] == [
        (0, 1, 196),
        (1, 2, 196),
        (2, 2, 196),
    ]
    assert 0.9 * budget < sum(image["nbytes"] for image in images) <= budget
    assert all(image["held"] < 0.3 and sum(image["entries"].values()) > 0 for image in images)
    status, card = change(talk, 2, SECOND["content"])
    assert status == 200
    restored = card["images"]
    assert sum(image["nbytes"] for image in restored) <= budget
    assert restored[2]["nbytes"] > images[2]["nbytes"]
    assert restored[1]["nbytes"] < images[1]["nbytes"]
    assert card == talk.card()
    reply = talk.ask(LAST)["plphp"]
    assert reply["conversation"] == talk.name
    images = talk.card()["images"]
    assert any(image["attention"] for image in images)
    assert reply["wanted"] == [image["number"] for image in images if image["wanted"]]


def test_a_restored_image_is_as_if_it_had_stayed(roomy: Client) -> None:
    """Of two images of a question the right one is found among both, and alone."""
    expected = talked(roomy)
    answer = expected.ask(LAST)["choices"][0]["message"]["content"]
    for content in (SECOND["content"], SECOND["content"][1:2]):
        talk = talked(roomy)
        status, card = change(talk, 2)
        assert (status, [image["forgotten"] for image in card["images"]]) == (200, [False, False, True])
        held = roomy.metrics()["plphp_conversation_bytes"]
        status, card = change(talk, 2, content)
        assert (status, [image["held"] for image in card["images"]]) == (200, [1.0, 1.0, 1.0])
        assert roomy.metrics()["plphp_conversation_bytes"] > held
        assert talk.ask(LAST)["choices"][0]["message"]["content"] == answer


def test_from_host_memory_without_the_image() -> None:
    for client in served("quantized:tiers=r4,vision_budget=60 tokens,tier_device=cpu"):
        talk = talked(client)
        before = talk.card()["images"]
        whole = sum(image["whole_bytes"] for image in before)
        metrics = client.metrics()
        assert metrics["plphp_image_bytes"] == pytest.approx(sum(image["nbytes"] for image in before), abs=3)
        assert metrics["plphp_image_bytes"] <= metrics["plphp_image_budget_bytes"] == 60 * whole / (3 * 196)
        assert metrics["plphp_image_host_bytes"] == whole
        status, card = change(talk, 0, ())
        assert status == 200
        assert card["images"][0]["nbytes"] > before[0]["nbytes"]
        client.get(f"/v1/conversations/{talk.name}", "DELETE")
        assert client.metrics()["plphp_image_bytes"] == client.metrics()["plphp_image_host_bytes"] == 0


BEFORE = r".* The conversation is as before\.$"
SEND = re.escape('Send {"content": [image parts]}')
HELD = {"type": "image_url", "image_url": {"url": "held:"}}
REFUSED: dict[str, tuple[object, Any, int, str]] = {
    "no such image": (3, None, 404, rf"has read 3 images, numbered from 0, and none of the number 3\.{BEFORE}"),
    "no number": ("first", None, 404, "There is no DELETE"),
    "another image": (1, FIRST["content"], 400, f"not among the 1 whose features{BEFORE}"),
    "no image": (1, (), 400, rf"takes its picture, and there is none\. {SEND}{BEFORE}"),
    "no parts": (1, [], 400, rf"takes its picture, and there is none\. {SEND}{BEFORE}"),
    "a part of text": (1, [{"type": "text", "text": "grid-1"}], 400, rf"there is none\. {SEND}{BEFORE}"),
    "a text": (1, "x", 400, rf"^content must be a list of image parts, got a string: 'x'\. {SEND}"),
    "a number": (1, 5, 400, rf"^content must be a list of image parts, got a number: 5\. {SEND}"),
    "an object": (1, {"type": "text"}, 400, r"^content must be a list of image parts, got an object: "),
    "as held": (1, [FIRST["content"][1], HELD], 400, rf"^Part 2 is 'held:', and .* takes the picture itself\. {SEND}"),
    "a file": (1, [{"type": "image_url", "image_url": {"url": "grid-1.png"}}], 400, "must be a data: URI"),
    "broken": (1, [{"type": "image_url", "image_url": {"url": "data:image/png;base64,YQ=="}}], 400, "part 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(name: str, two_read: Talk) -> None:
    image, content, status, text = REFUSED[name]
    before = two_read.card()
    got, message = change(two_read, image, content)
    assert got == status
    assert re.search(text, message)
    assert "pixel_values" not in message  # no client of HTTP can send features
    assert two_read.card() == before


def test_another_body_is_refused(two_read: Talk) -> None:
    path = f"/v1/conversations/{two_read.name}/images/1/restore"
    for sent in ({"image": "data:"}, {"content": [], "text": ""}):
        status, page = two_read.client.get(path, "POST", sent)
        assert (status, json.loads(page)["error"]["param"]) == (400, "content")


def test_without_a_budget_or_a_conversation() -> None:
    for client in served("quantized:tiers=r4"):
        talk = talked(client, FIRST)
        assert talk.card()["images"][0].keys() >= {"number", "tokens", "nbytes", "held", "vision_kept"}
        status, message = change(talk, 0)
        assert status == 400
        assert "vision_budget=1GB" in message
        talk.name = "new"
        assert change(talk, 0)[0] == 404


def test_an_error_in_the_middle_ends_the_conversation(roomy: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory left")

    talk = talked(roomy, FIRST)
    monkeypatch.setattr(memory_cache, "forget", fail)
    status, message = change(talk, 0)
    assert status == 500
    assert message.endswith("The conversation is over: begin a new one.")
    assert roomy.get(f"/v1/conversations/{talk.name}")[0] == 404
