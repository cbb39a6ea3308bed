# SPDX-License-Identifier: Apache-2.0
"""Conversations over HTTP with the bundled model: a turn reads what is new, and is whole or was never there."""

from __future__ import annotations

import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import torch

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from chat_client import NAME, Client, Talk, said, serving, user

import plphp
from plphp import PLPHPConfig
from plphp.engines.hf.cache_argument import cache_in, passed
from plphp.inputs.prompt import build_inputs
from plphp.serving.options import Limits

CONFIG = PLPHPConfig.parse("query_bank:bank=bundled,tiers=t10")
LIMITS = Limits(conversations=3, max_queue=8)
FIRST = user("What is in row 1?", ["grid-1.png"])
SECOND = user("And in row 2?")
THIRD = user("Which digit is yellow?", ["grid-2.png"])


def by_hand(loaded: Any, questions: list[dict[str, Any]]) -> list[str]:
    """The answers of one cache that reads turn after turn."""
    model, processor = loaded
    chat: list[dict[str, Any]] = []
    cache = None
    with plphp.prune(model, CONFIG), torch.no_grad():
        for question in questions:
            chat.append(question)
            inputs = build_inputs(processor, messages=chat)
            output = model.generate(
                **inputs, **passed(cache), do_sample=False, max_new_tokens=64, return_dict_in_generate=True
            )
            cache = cache_in(output)
            tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
            chat.append(said(processor.decode(tokens, skip_special_tokens=True)))
    return [message["content"] for message in chat[1::2]]


def test_turns_read_what_is_new(loaded: Any, client: Client) -> None:
    before, talk = client.metrics(), Talk(client)
    replies = [talk.ask(question) for question in (FIRST, SECOND, THIRD)]
    assert [message["content"] for message in talk.chat[1::2]] == by_hand(loaded, [FIRST, SECOND, THIRD])
    held = [reply["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0) for reply in replies]
    # All tokens of a turn but the one that ended its answer.
    assert held[0] == 0
    assert held[1:] == [reply["usage"]["total_tokens"] - 1 for reply in replies[:2]]
    assert [reply["plphp"]["vision_tokens"] for reply in replies] == [196, 0, 196]
    assert len({reply["plphp"]["conversation"] for reply in replies}) == 1
    card = talk.card()
    assert (card["turns"], card["messages"], card["tokens"]) == (3, 6, replies[2]["usage"]["total_tokens"] - 1)
    assert [image["tokens"] for image in card["images"]] == [196, 196]
    assert 0 < sum(image["nbytes"] for image in card["images"]) < card["kv_bytes"] < card["kv_bytes_full"]
    after = client.metrics()
    difference = {name: value - before.get(name, 0) for name, value in after.items()}
    assert difference["plphp_conversation_turns_total"] == 3
    assert difference["plphp_cached_prompt_tokens_total"] == sum(held)
    assert difference["plphp_prompts_total"] == 2
    assert difference["plphp_vision_tokens_total"] == 2 * 196
    kept = [image["vision_kept"] * 196 for image in card["images"]]
    assert difference["plphp_kept_vision_tokens_total"] == pytest.approx(8 * sum(kept), rel=1e-3)
    assert after["plphp_conversation_bytes"] >= card["kv_bytes"]


def test_names_cannot_be_guessed_and_are_told_apart(client: Client) -> None:
    names = [Talk(client).ask(FIRST, max_tokens=2)["plphp"]["conversation"] for _ in range(2)]
    assert len(set(names)) == 2
    assert all(len(name) == 32 for name in names)
    assert Talk(client).client.answer([FIRST], max_tokens=2)["plphp"].keys() == {
        *("vision_tokens", "retention", "vision_held", "kv_bytes", "kv_bytes_full")
    }


def test_a_stream_says_its_name(client: Client) -> None:
    chunks = client.events([FIRST], plphp={"conversation": "new"}, max_tokens=4)
    talk = Talk(client)
    talk.name = chunks[-1]["plphp"]["conversation"]
    talk.chat = [FIRST, said("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks))]
    chunks = client.events(
        [*talk.chat, SECOND],
        plphp={"conversation": talk.name},
        max_tokens=4,
        stream_options={"include_usage": True},
    )
    assert chunks[-1]["plphp"]["conversation"] == chunks[-2]["plphp"]["conversation"] == talk.name
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 196
    assert talk.card()["turns"] == 2


REFUSED: dict[str, tuple[Any, int, str]] = {
    "unknown": ({"conversation": "x" * 32}, 404, "There is no conversation"),
    "a number": ({"conversation": 1}, 400, "plphp must be"),
    "another field": ({"conversation": "new", "method": "none"}, 400, "plphp must be"),
    "a text": ("new", 400, "plphp must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, client: Client) -> None:
    sent, status, part = REFUSED[name]
    got, reply = client.post({"messages": [FIRST], "plphp": sent})
    assert (got, reply["error"]["param"]) == (status, "plphp")
    assert part in reply["error"]["message"]


def test_another_history_is_refused_and_changes_nothing(client: Client) -> None:
    talk = Talk(client)
    first = talk.ask(FIRST)
    chat, tokens = list(talk.chat), talk.card()["tokens"]
    histories = {
        "Message 1 of the chat differs": [user("What is in row 1?", ["grid-2.png"]), chat[1], SECOND],
        "Message 2 of the chat differs from the answer that this server gave": [FIRST, said("Nothing."), SECOND],
        "has 2 messages": chat,
        "has 1 messages": [FIRST],
    }
    for part, history in histories.items():
        talk.chat = []
        status, text = talk.refused(*history)
        assert status == 400
        assert part in text
    talk.chat = chat
    assert talk.card()["tokens"] == tokens
    talk.chat[1] = said(f" {first['choices'][0]['message']['content']}\n")  # as some clients keep it
    assert talk.ask(SECOND)["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens


def test_an_answer_that_was_stopped_goes_on_from_its_text(client: Client) -> None:
    talk = Talk(client)
    whole = talk.ask(FIRST)["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2 : len(whole) // 2 + 5]
    talk = Talk(client)
    reply = talk.ask(FIRST, stop=middle)
    text = reply["choices"][0]["message"]["content"]
    assert text == whole[: whole.index(middle)]
    assert talk.card()["tokens"] <= reply["usage"]["total_tokens"] - 1
    assert talk.ask(SECOND)["choices"][0]["message"]["content"].startswith("Row 2")
    assert talk.ask(SECOND, max_tokens=3)["choices"][0]["finish_reason"] == "length"
    assert talk.ask(SECOND)["choices"][0]["message"]["content"].startswith("Row 2")


def test_an_answer_that_would_be_tokenized_otherwise(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, served = running
    decoded = served._decoded
    monkeypatch.setattr(served, "_decoded", lambda tokens: decoded(tokens).upper())
    talk = Talk(client)
    reply = talk.ask(FIRST)
    assert talk.chat[1]["content"].startswith("ROW 1 SHOWS")
    monkeypatch.undo()
    after = talk.ask(SECOND)
    assert after["choices"][0]["message"]["content"].startswith("Row 2 shows")
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == reply["usage"]["total_tokens"] - 1


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves(stream: bool, client: Client) -> None:
    """A turn of text is taken back; a turn with an image cannot be, and the conversation is over."""
    talk = Talk(client)
    talk.ask(FIRST)
    tokens = talk.card()["tokens"]
    for question, status in ((SECOND, 200), (THIRD, 404)):
        body = {"messages": [*talk.chat, question], "plphp": {"conversation": talk.name}, "stream": stream}
        with closing(client.send({**body, "max_tokens": 1000, "ignore_eos": True})) as gone:
            if stream:
                gone.getresponse().read(300)
            else:
                client.wait_for("plphp_requests_running", 1)
                assert talk.refused(SECOND)[0] == 409
                assert client.get(f"/v1/conversations/{talk.name}", "DELETE")[0] == 409
        client.wait_for("plphp_requests_running", 0)
        end = time.monotonic() + 10
        while client.get(f"/v1/conversations/{talk.name}")[0] == 409 and time.monotonic() < end:
            time.sleep(0.02)
        assert client.get(f"/v1/conversations/{talk.name}")[0] == status
        if status == 200:
            assert talk.card()["tokens"] == tokens
            assert talk.ask(SECOND)["choices"][0]["message"]["content"].startswith("Row 2")
    assert talk.refused(SECOND)[0] == 404


def test_delete(client: Client) -> None:
    talk = Talk(client)
    talk.ask(FIRST, max_tokens=2)
    status, page = client.get(f"/v1/conversations/{talk.name}", "DELETE")
    assert (status, json.loads(page)) == (200, {"id": talk.name, "object": "conversation.deleted", "deleted": True})
    assert client.get(f"/v1/conversations/{talk.name}")[0] == 404
    assert talk.refused(SECOND)[0] == 404


def test_memory_is_flat_and_the_oldest_leave(client: Client) -> None:
    talks = [Talk(client) for _ in range(8)]
    for talk in talks:
        talk.ask(FIRST, max_tokens=2)
    gc.collect()
    caches = sum(type(item) is plphp.PrunedCache for item in gc.get_objects())
    assert (client.metrics()["plphp_conversations"], caches) == (3, 3)
    statuses = [client.get(f"/v1/conversations/{talk.name}")[0] for talk in talks]
    assert statuses == [404] * 5 + [200] * 3


def test_many_clients_talk_at_once(loaded: Any) -> None:
    """Every other of six clients leaves in its second turn, and asks it again."""
    with serving(*loaded, CONFIG, Limits(conversations=6)) as (client, _):
        expected = by_hand(loaded, [FIRST, SECOND])

        def converse(number: int) -> list[str]:
            talk = Talk(client)
            talk.ask(FIRST)
            if number % 2:
                body = {"messages": [*talk.chat, SECOND], "plphp": {"conversation": talk.name}, "stream": True}
                with closing(client.send({**body, "max_tokens": 900, "ignore_eos": True})) as gone:
                    gone.getresponse().read(200)
                while talk.refused()[0] == 409:
                    time.sleep(0.05)
            talk.ask(SECOND)
            return [message["content"] for message in talk.chat[1::2]]

        with ThreadPoolExecutor(6) as clients:
            assert list(clients.map(converse, range(6))) == [expected] * 6
        client.wait_for("plphp_requests_waiting", 0)
        metrics = client.metrics()
        assert metrics["plphp_conversations"] == 6
        assert "plphp_conversations_ended_total" not in metrics


def test_a_conversation_too_large_to_hold(loaded: Any) -> None:
    with serving(*loaded, CONFIG, Limits(conversations=3, conversation_bytes=1000), api_key="a") as (client, _):
        key = {"Authorization": "Bearer a"}
        body = {"model": NAME, "messages": [FIRST], "plphp": {"conversation": "new"}, "max_tokens": 2}
        status, reply = client.post(body, **key)
        assert (status, reply["plphp"]["conversation"]) == (200, None)
        assert client.metrics()["plphp_conversations"] == 0
        assert client.get("/v1/conversations/a")[0] == 401
