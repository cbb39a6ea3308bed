# SPDX-License-Identifier: Apache-2.0
"""The fields of a request: read, without effect, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from plphp.errors import (
    CacheMemoryError,
    CacheStateError,
    ConfigError,
    LoadError,
    NonFiniteAttentionError,
    SpanError,
    UnsupportedFeatureError,
)
from plphp.inputs.fetching import WebAddress
from plphp.serving.chat_messages import fetch_images
from plphp.serving.chat_request import ChatRequest, read_request
from plphp.serving.options import Limits
from plphp.serving.refusals import RequestError, refusal_of

ASK = [{"role": "user", "content": "What?"}]


def read(limits: Limits | None = None, **fields: Any) -> ChatRequest:
    return read_request(json.dumps({"messages": ASK, **fields}).encode(), "name", limits or Limits())


def test_a_bare_chat() -> None:
    assert read(model="name") == ChatRequest(
        messages=[{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
        max_new_tokens=None,
        min_new_tokens=0,
        options={"do_sample": False},
        seed=None,
        stop=(),
        stream=False,
        include_usage=False,
    )


def test_a_conversation() -> None:
    assert read(plphp={"conversation": "new"}).conversation == "new"
    assert read(plphp={}) == read(plphp={"conversation": None}) == read()


def test_fields_without_effect() -> None:
    fields = {"user": "me", "metadata": {"a": 1}, "n": 1, "logprobs": False, "stop": None, "tools": None}
    assert read(**fields, response_format={"type": "text"}, presence_penalty=0.0) == read()


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": 1e-30, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7, "top_p": 1.0}),
        ({"top_p": 0.9, "top_k": -1}, {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0}),
        ({"repetition_penalty": 1.2}, {"do_sample": False, "repetition_penalty": 1.2}),
    ],
)
def test_sampling(fields: dict[str, Any], options: dict[str, Any]) -> None:
    assert read(**fields).options == options


def test_lengths() -> None:
    assert read(max_tokens=5, max_completion_tokens=5).max_new_tokens == 5
    assert read(max_tokens=5, min_tokens=5).min_new_tokens == 5
    assert read(max_tokens=5, ignore_eos=True).min_new_tokens == 5
    assert read(Limits(max_new_tokens=9), ignore_eos=True).min_new_tokens == 9


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "contradict each other"),
        ({"n": True}, "n", "n must be 1 or left out, got True"),
        ({"logprobs": 0}, "logprobs", "must be false"),
        ({"presence_penalty": False}, "presence_penalty", "must be 0"),
        ({"plphp": {"conversation": 5}}, "plphp", "plphp must be"),
        ({"max_tokens": 0}, "max_tokens", "an integer between 1 and 1024, got 0"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer"),
        ({"max_tokens": True}, "max_tokens", "an integer"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "above the longest answer"),
        ({"temperature": -1}, "temperature", "a number of at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature", "a number"),
        ({"temperature": float("inf")}, "temperature", "a number"),
        ({"temperature": "1"}, "temperature", "a number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.1}, "top_p", "between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 100"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "between 0.01 and 100"),
        ({"seed": 2**70}, "seed", "an integer"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": [1]}, "stop", "a text or a list of texts"),
        ({"stop": ["a"] * 17}, "stop", "may hold 16 texts, got 17"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "are for streams"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options", "must be"),
        ({"response_format": {"type": "json_object"}}, "response_format", 'must be {"type": "text"}'),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "has the role 'tool'"),
        ({"messages": [{**ASK[0], "tool_calls": [1]}]}, "messages", "'tool_calls', which this server cannot read"),
    ],
)
def test_refused(fields: dict[str, Any], param: str, part: str) -> None:
    with pytest.raises(RequestError, match=part) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("messages", [[], [1], [{"role": 1}], [{"role": "user"}], [{"role": "user", "content": [1]}]])
def test_what_is_no_chat(messages: Any) -> None:
    with pytest.raises(ConfigError):
        read(messages=messages)


def test_all_that_is_fetched_is_as_large_as_a_request_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[int] = []

    def fetch(address: WebAddress, *, max_bytes: int) -> bytes:
        allowed.append(max_bytes)
        if max_bytes < 40:
            raise LoadError("too large")
        return b"a" * 40

    monkeypatch.setattr("plphp.serving.chat_messages.fetch", fetch)
    part = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    limits = Limits(max_body_bytes=100, allow_urls=True)
    chat = read(limits, messages=[{"role": "user", "content": [part] * 3}]).messages
    with pytest.raises(LoadError, match="Message 1 of the chat, part 3: too large"):
        fetch_images(chat, limits)
    assert allowed == [100, 60, 20]
    assert chat[0]["content"][1]["image"] == b"a" * 40


def test_nothing_is_fetched_from_the_network_of_the_server() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}
    limits = Limits(allow_urls=True)
    chat = read(limits, messages=[{"role": "user", "content": [part]}]).messages
    with pytest.raises(LoadError, match=r"part 1: 127\.0\.0\.1 is at 127\.0\.0\.1, which is no public address"):
        fetch_images(chat, limits)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("a", status=413), 413),
        (LoadError("a"), 400),
        (ConfigError("a"), 400),
        (SpanError("a"), 400),
        (UnsupportedFeatureError("a"), 400),
        (NonFiniteAttentionError("a"), 422),
        (CacheMemoryError("a"), 503),
        (MemoryError("a"), 503),
        (CacheStateError("a"), 500),
        (ValueError("a"), 500),
    ],
)
def test_status_of_errors(error: Exception, status: int) -> None:
    refusal = refusal_of(error)
    assert refusal.status == status
    assert (refusal.body["error"]["message"] == "a") == (status < 500)


@pytest.mark.parametrize("limit", [{"max_images": -1}, {"max_queue": 0}, {"max_model_len": 0}, {"max_body_bytes": 1.5}])
def test_limits_are_checked(limit: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Limits(**limit)
