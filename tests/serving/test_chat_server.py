# SPDX-License-Identifier: Apache-2.0
"""A server over HTTP with the bundled model: its answers are those of ``plphp generate``."""

from __future__ import annotations

import gc
import json
import threading
import time
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from chat_client import CHAT, NAME, Client, data_uri, serving, user

import plphp
from plphp import PLPHPConfig, PrunedCache
from plphp.errors import ConfigError, NonFiniteAttentionError, UnsupportedFeatureError
from plphp.inputs.prompt import build_inputs
from plphp.serving.answer_text import AnswerText
from plphp.serving.line import Line
from plphp.serving.options import Limits
from plphp.serving.refusals import RequestError
from plphp.serving.served_model import ServedModel

CONFIG = PLPHPConfig.parse("query_bank:bank=bundled,tiers=t10")
LIMITS = Limits(max_images=3, max_image_pixels=500_000, max_body_bytes=300_000, max_queue=8, body_seconds=1)
GRID = [user("Tell me what you see in row 3, column 3.", ["grid-1.png"])]
LINES = [user("Read all the text.", ["page-1.png"])]


def reference(loaded: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, int, int]:
    """What ``plphp generate`` answers, the tokens of the prompt and of the answer."""
    model, processor = loaded
    inputs = build_inputs(processor, messages=messages)
    length = inputs["input_ids"].shape[1]
    with plphp.prune(model, CONFIG), torch.no_grad():
        output = model.generate(**inputs, do_sample=False, **{"max_new_tokens": 128, **options})
    tokens = output[0, length:]
    return processor.decode(tokens, skip_special_tokens=True), length, len(tokens)


def chats() -> dict[str, list[dict[str, Any]]]:
    trio = [user("Which of the images shows a red digit?", ["trio-1.png", "duo-1.png", "grid-2.png"])]
    said = {"role": "assistant", "content": "Line 2 says UUT.", "refusal": None, "tool_calls": []}
    turns = [user("What does line 2 say?", ["page-1.png"]), said, user("And which digit is yellow?", ["grid-2.png"])]
    return {"one": GRID, "lines": LINES, "several": trio, "second turn": turns}


@pytest.mark.parametrize("name", chats())
def test_answers_are_those_of_generate(name: str, loaded: Any, client: Client) -> None:
    messages = chats()[name]
    text, prompt, answer = reference(loaded, messages)
    reply = client.answer(messages)
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    assert len(text) > 5
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    assert reply["usage"] == usage
    images = sum(part["type"] == "image_url" for message in messages for part in message["content"] if "type" in part)
    assert reply["plphp"]["vision_tokens"] == 196 * images
    assert 0.05 < reply["plphp"]["vision_held"] < 0.15
    assert reply["plphp"]["kv_bytes"] < reply["plphp"]["kv_bytes_full"]
    chunks = client.events(messages, stream_options={"include_usage": True})
    deltas = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(deltas) == text
    assert len(deltas) > 5
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert (chunks[-1]["usage"], chunks[-1]["plphp"]) == (usage, reply["plphp"])
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_text_alone_and_what_only_clients_write(client: Client) -> None:
    reply = client.answer([{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    assert reply["plphp"]["vision_tokens"] == 0
    assert reply["plphp"]["kv_bytes"] == reply["plphp"]["kv_bytes_full"]
    assert client.text(GRID, user="me", n=1, tools=[], metadata=None) == client.text(GRID)


def test_stop_and_length(loaded: Any, client: Client) -> None:
    text, _, tokens = reference(loaded, LINES)
    assert "\nLine 2" in text
    for stop in ("\nLine 2", ["never", "\nLine 2", "\nLine 2: UUT"]):
        reply = client.answer(LINES, stop=stop)
        assert reply["choices"][0]["message"]["content"] == text[: text.index("\nLine 2")]
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert reply["usage"]["completion_tokens"] < tokens
        chunks = client.events(LINES, stop=stop)
        streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert streamed == text[: text.index("\nLine 2")]
    short = client.answer(LINES, max_tokens=3)
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    assert short["choices"][0]["message"]["content"] == reference(loaded, LINES, max_new_tokens=3)[0]
    long = client.answer(LINES, max_completion_tokens=tokens + 5, ignore_eos=True)
    assert (long["usage"]["completion_tokens"], long["choices"][0]["finish_reason"]) == (tokens + 5, "length")


def test_sampling_has_a_seed(client: Client) -> None:
    drawn = [client.text(LINES, temperature=3, seed=seed, max_tokens=24) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert client.text(LINES, temperature=0) == client.text(LINES)


def image(source: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": source}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "another model": ({"model": "gpt-4o", "messages": GRID}, 404, "is not served here: ask for 'bundled'"),
    "no messages": ({}, 400, "'messages' is missing"),
    "broken image": ({"messages": image("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAE=")}, 400, "part 1"),
    "half an image": ({"messages": image(data_uri("grid-1.png")[:400])}, 400, "part 1: The image of"),
    "no base64": ({"messages": image("data:image/png;base64,!")}, 400, "broken"),
    "text for an image": ({"messages": image("data:text/plain;base64,bm8=")}, 400, "not an image"),
    "a file": ({"messages": image("/etc/passwd")}, 400, "must be a data: URI, got '/etc/passwd'"),
    "a file's address": ({"messages": image("file:///etc/passwd")}, 400, "must be a data: URI"),
    "an address": ({"messages": image("http://example.org/a.png")}, 400, "--allow-urls"),
    "an address without its slashes": ({"messages": image("http:example.org")}, 400, "must be a data: URI"),
    "too many images": ({"messages": [user("a", ["grid-1.png"] * 4)]}, 400, "has 4 images.*3 at most"),
    "a video": ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}, 400, "no videos"),
    "nothing asked": ({"messages": [user(" ", ["grid-1.png"])]}, 400, "no text"),
    "the image's token": ({"messages": [user("<image> a")]}, 400, "1 image slot"),
    "long": ({"messages": [user("word " * 4000)]}, 400, "prompt of .* tokens is more than the 4096"),
    "far too long": ({"messages": [user("word " * 40000)]}, 400, "far more than 4096 tokens"),
    "long answer": ({"messages": GRID, "max_tokens": 2000}, 400, "max_tokens must be an integer between 1 and 1024"),
    "half a character": ({"messages": [user("\ud800")]}, 400, "no Unicode"),
    "n": ({"messages": GRID, "n": 2}, 400, "n must be 1 or left out, got 2"),
    "tools": ({"messages": GRID, "tools": [{"type": "function"}]}, 400, "tools must be"),
    "unknown": ({"messages": GRID, "temprature": 1}, 400, "Did you mean 'temperature'"),
    "settings": ({"messages": GRID, "plphp": "none"}, 400, "plphp must be"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refused(name: str, stream: bool, client: Client) -> None:
    body, expected, part = REFUSED[name]
    status, reply = client.post({"stream": stream, **body})
    error = reply["error"]
    assert (status, error["type"]) == (expected, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    with pytest.raises(ValueError, match=part):
        raise ValueError(error["message"])


def test_the_pixels_of_an_image(client: Client) -> None:
    from PIL import Image

    status, reply = client.post({"messages": [user("a", [Image.new("RGB", (1000, 501))])]})
    assert status == 400
    assert "more than 500,000" in reply["error"]["message"]


def test_bodies_that_are_none(client: Client) -> None:
    assert client.post(b"{")[0] == 400
    assert client.post(b"[1]")[0] == 400
    assert client.post(b"[" * 100_000)[0] == 400
    status, reply = client.post({"messages": [user("a" * 300_000)]})
    assert (status, reply["error"]["code"]) == (413, "request_too_large")
    chunked = client.connect()
    chunked.request("POST", CHAT, iter([b"a" * 100_000] * 4), {"Content-Type": "application/json"}, encode_chunked=True)
    assert chunked.getresponse().status == 413
    chunked.close()
    assert client.post({"messages": GRID}, **{"Content-Type": "text/plain"})[0] == 415
    slow = client.connect()
    slow.putrequest("POST", CHAT)
    slow.putheader("Content-Type", "application/json")
    slow.putheader("Content-Length", "100")
    slow.endheaders(b"{")
    assert slow.getresponse().status == 408
    slow.close()
    assert client.text(GRID)


def test_slow_bodies_keep_nobody_out(client: Client) -> None:
    slow = [client.connect() for _ in range(LIMITS.max_queue)]
    for connection in slow:
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
    assert client.text(GRID, max_tokens=2)
    for connection in slow:
        assert connection.getresponse().status == 408
        connection.close()


def test_bodies_on_their_way_are_bounded_by_bytes() -> None:
    line = Line(2, 100)
    with line.arriving() as take:
        take(60)
        with line.arriving() as other, pytest.raises(RequestError, match="60 bytes of other requests"):
            other(41)
        with line.arriving() as other:
            other(40)
    with line.arriving() as take, line.place(), line.place():
        take(100)
        with pytest.raises(RequestError, match="2 requests already"), line.arriving():
            pass


def test_pages(client: Client) -> None:
    status, page = client.get("/v1/models")
    (card,) = json.loads(page)["data"]
    assert (status, card["id"], card["max_model_len"]) == (200, NAME, 4096)
    assert json.loads(client.get(f"/v1/models/{NAME}")[1]) == card
    assert client.get("/v1/models/other")[0] == 404
    assert client.get("/health") == (200, '{"status":"ok"}')
    assert client.get(CHAT)[0] == 405
    status, page = client.get("/v1/completions", "POST")
    assert status == 404
    assert "chats go to POST" in json.loads(page)["error"]["message"]


def test_metrics(client: Client) -> None:
    before = client.metrics()
    reply = client.answer([user("Which digit is yellow?", ["grid-2.png", "grid-1.png"])])
    client.wait_for("plphp_requests_waiting", 0)
    after = client.metrics()
    difference = {name: value - before.get(name, 0) for name, value in after.items()}
    assert difference["plphp_prompts_total"] == difference['plphp_requests_totalstatus="200"'] == 1
    assert difference["plphp_vision_tokens_total"] == 2 * 196
    layers = 8
    assert difference["plphp_kept_vision_tokens_total"] == pytest.approx(
        layers * 2 * 196 * reply["plphp"]["retention"], rel=1e-3
    )
    assert difference["plphp_kv_held_bytes_total"] == reply["plphp"]["kv_bytes"]
    assert difference["plphp_kv_full_bytes_total"] == reply["plphp"]["kv_bytes_full"]
    assert difference["plphp_retention_sum"] == pytest.approx(reply["plphp"]["retention"], abs=1e-3)
    assert difference["plphp_prompt_tokens_total"] == reply["usage"]["prompt_tokens"]
    assert difference["plphp_generation_tokens_total"] == reply["usage"]["completion_tokens"]
    assert difference["plphp_request_seconds_count"] == difference["plphp_first_token_seconds_count"] == 1


def live_caches() -> int:
    return sum(type(item) is PrunedCache for item in gc.get_objects())


def wait_until_freed(before: int) -> None:
    """Wait for the thread of the model, which counts a request as answered before it has left its frames."""
    end = time.monotonic() + 10
    while live_caches() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert live_caches() <= before


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_the_model(stream: bool, client: Client) -> None:
    gc.collect()
    before, left = live_caches(), client.status_count(499)
    tokens = client.metrics()["plphp_generation_tokens_total"]
    gone = client.send({"messages": LINES, "stream": stream, "max_tokens": 1024, "ignore_eos": True})
    if stream:
        gone.getresponse().read(300)
    else:
        client.wait_for("plphp_requests_running", 1)
    gone.close()
    client.wait_for("plphp_requests_running", 0)
    client.wait_for('plphp_requests_totalstatus="499"', left + 1)
    assert client.metrics()["plphp_generation_tokens_total"] - tokens < 900
    assert client.text(GRID) == "Row 3, column 3 shows an orange 0."
    gc.collect()
    wait_until_freed(before)


def test_the_line_is_bounded_and_fair(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, served = running
    go_on, order, answer = threading.Event(), [], served.answer

    def slow(prompt: Any, request: Any, *rest: Any) -> Any:
        order.append(request.max_new_tokens)
        go_on.wait(30)
        return answer(prompt, request, *rest)

    monkeypatch.setattr(served, "answer", slow)
    waiting = []
    for number in range(1, 9):
        waiting.append(client.send({"messages": GRID, "max_tokens": number}))
        client.wait_for("plphp_requests_waiting", number - 1)
        client.wait_for("plphp_requests_running", 1)
    with closing(client.send({"messages": GRID})) as refused:
        full = refused.getresponse()
        assert (full.status, full.headers["Retry-After"]) == (503, "5")
        assert json.loads(full.read())["error"]["type"] == "server_error"
    assert client.get("/health")[0] == 200
    waiting.pop(3).close()  # the fourth in the line, and its place is free at once
    client.wait_for("plphp_requests_waiting", 6)
    go_on.set()
    replies = [connection.getresponse() for connection in waiting]
    assert [reply.status for reply in replies] == [200] * 7
    assert order == [1, 2, 3, 5, 6, 7, 8]
    lengths = [json.loads(reply.read())["usage"]["completion_tokens"] for reply in replies]
    assert lengths == order
    for connection in waiting:
        connection.close()


@pytest.mark.parametrize(
    "failure", [RuntimeError("secret"), torch.OutOfMemoryError("secret"), NonFiniteAttentionError("NaN")]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_model_fails(failure: Exception, stream: bool, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, served = running
    with monkeypatch.context() as patched:

        def fail(*_: Any) -> None:
            raise failure

        patched.setattr(served, "answer", fail)
        status, reply = client.post({"messages": GRID, "stream": stream})
    expected = {RuntimeError: 500, torch.OutOfMemoryError: 503, NonFiniteAttentionError: 422}
    assert status == expected[type(failure)]
    assert "secret" not in reply["error"]["message"]
    assert client.text(GRID)


def test_the_model_fails_in_a_stream(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, served = running
    with monkeypatch.context() as patched:

        def fail(prompt: Any, request: Any, tell: Any, left: Any) -> None:
            tell("Half an ")
            raise RuntimeError("secret")

        patched.setattr(served, "answer", fail)
        chunks = client.events(GRID)
    assert chunks[1]["choices"][0]["delta"] == {"content": "Half an "}
    assert chunks[-1]["error"]["type"] == "server_error"
    assert client.status_count(500) >= 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_that_fails_leaves_no_cache(stream: bool, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = live_caches()
    gc.disable()  # memory is freed with the error, and not some time later
    try:
        with monkeypatch.context() as patched:
            add = AnswerText.add

            def fail(self: AnswerText, token: int) -> str:
                if len(self.tokens) == 3:
                    raise MemoryError  # the log does not hold it, as pytest's would hold others
                return add(self, token)

            patched.setattr(AnswerText, "add", fail)
            with closing(client.send({"messages": LINES, "stream": stream})) as connection:
                response = connection.getresponse()
                assert response.status == (200 if stream else 503)
                assert b"The server has no memory" in response.read()
        client.wait_for("plphp_requests_running", 0)
        wait_until_freed(before)
    finally:
        gc.enable()
    assert client.text(GRID)


def test_a_key(loaded: Any) -> None:
    with serving(*loaded, CONFIG, api_key="secret") as (client, _):
        assert client.post({"messages": GRID})[0] == 401
        assert client.post({"messages": GRID}, Authorization="Bearer secre")[0] == 401
        assert client.get("/v1/models")[0] == 401
        assert client.get("/health")[0] == client.get("/metrics")[0] == 200
        assert client.post({"messages": GRID}, Authorization="Bearer secret")[0] == 200


def test_a_bank_that_the_server_collects(loaded: Any) -> None:
    config = PLPHPConfig.parse("query_bank:retention_rate=0.4,collect=2")
    with serving(*loaded, config) as (client, served):
        served.try_out()  # counts for nothing
        replies = [client.answer(messages) for messages in (GRID, LINES, GRID)]
        assert [reply["plphp"]["retention"] for reply in replies[:2]] == [1.0, 1.0]
        assert replies[2]["plphp"]["retention"] == pytest.approx(0.4, abs=0.02)
        metrics = client.metrics()
        assert (metrics["plphp_bank_prompts"], metrics["plphp_whole_prompts_total"]) == (2, 2)


def test_the_server_stops_within_an_answer(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plphp.serving.server.SECONDS_TO_STOP", 1)
    with ExitStack() as stopping:
        client, _ = stopping.enter_context(serving(*loaded, CONFIG, Limits(max_new_tokens=3500)))
        with closing(client.send({"messages": GRID, "ignore_eos": True})):
            client.wait_for("plphp_requests_running", 1)
            started = time.monotonic()
            stopping.close()
            assert time.monotonic() - started < 8


def test_what_the_model_cannot_do_is_refused_first(loaded: Any) -> None:
    model, processor = loaded
    served = ServedModel(model, processor, PLPHPConfig.parse("oracle:retention_rate=0.5"), "eager", Limits())
    try:
        with pytest.raises(UnsupportedFeatureError):
            served.try_out()
    finally:
        served.close()
    with pytest.raises(ConfigError, match="the model knows 4096 positions"):
        ServedModel(model, processor, CONFIG, "eager", Limits(max_model_len=5000))
