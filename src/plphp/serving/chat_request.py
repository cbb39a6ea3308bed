# SPDX-License-Identifier: Apache-2.0
"""The body of a chat completion, every field of which is understood, changes nothing, or is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plphp.errors import did_you_mean
from plphp.io.quoting import quoted

from .chat_messages import read_messages
from .options import Limits
from .refusals import RequestError

READ = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "min_tokens", "ignore_eos", "temperature", "top_p"),
    *("top_k", "repetition_penalty", "seed", "stop", "stream", "stream_options", "plphp"),
)
WITHOUT_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that say nothing about the answer."""
ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""By field, the values that ask for nothing that this server cannot do."""
GREEDY_BELOW = 0.001
"""Temperature that counts as 0: logits that are divided by less may overflow."""
MOST_STOPS = 16


@dataclass(frozen=True)
class ChatRequest:
    """A chat that is to be answered.

    Parameters
    ----------
    messages : list of dict
        As `plphp.serving.chat_messages.read_messages` returns them.
    max_new_tokens : int, optional
        Tokens of the answer at most; None if the client does not say.
    min_new_tokens : int
        Tokens before which the answer does not end by itself; 0 for none.
    options : dict
        Arguments of ``generate`` on sampling.
    seed : int, optional
        Seed of the sampling.
    stop : tuple of str
        Texts at which the answer ends.
    stream : bool
        Whether the answer is sent while it is written.
    include_usage : bool
        Whether a stream ends with the numbers of tokens.
    conversation : str, optional
        The conversation that it goes on with, or "new" to begin one; None for a chat whose cache is not held.
    """

    messages: list[dict[str, Any]]
    max_new_tokens: int | None
    min_new_tokens: int
    options: dict[str, Any]
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    conversation: str | None = None


def read_request(body: bytes, model_name: str, limits: Limits) -> ChatRequest:
    """Read a chat completion.

    Parameters
    ----------
    body : bytes
        JSON.
    model_name : str
        The model that is served.
    limits : Limits
        What may be asked for.

    Raises
    ------
    RequestError
        If a field is unknown, out of range, or asks for what this server cannot do.
    PLPHPError
        If the messages are not a chat, see `plphp.serving.chat_messages.read_messages`.
    """
    fields = _fields(body)
    name = fields.get("model", model_name)
    if name != model_name:
        text = f"The model {quoted(name)} is not served here: ask for {model_name!r}."
        raise RequestError(text, status=404, param="model", code="model_not_found")
    if "messages" not in fields:
        raise RequestError("'messages' is missing: send the chat as a list of messages.", param="messages")
    longest = _max_new_tokens(fields, limits)
    shortest = _integer(fields, "min_tokens", 0) or 0
    if _flag(fields, "ignore_eos"):
        shortest = longest or limits.max_new_tokens
    elif shortest > (longest or limits.max_new_tokens):
        raise RequestError(f"min_tokens is {shortest}, above the longest answer.", param="min_tokens")
    stream = _flag(fields, "stream")
    return ChatRequest(
        messages=read_messages(fields["messages"], limits),
        max_new_tokens=longest,
        min_new_tokens=shortest,
        options=_sampling(fields),
        seed=_integer(fields, "seed", -(2**63), 2**63 - 1),
        stop=_stops(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        conversation=_conversation(fields),
    )


def _fields(body: bytes) -> dict[str, Any]:
    """The fields that are not null, after a check that each is known."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request is not JSON: {str(error)[:200]}.") from error
    if not isinstance(values, dict):
        raise RequestError(f"The request must be an object of JSON, got {quoted(values)}.")
    fields = {key: value for key, value in values.items() if value is not None}
    for key, value in fields.items():
        if key in ONLY and not any(_same(value, allowed) for allowed in ONLY[key]):
            possible = " or ".join(json.dumps(allowed) for allowed in ONLY[key])
            raise RequestError(f"{key} must be {possible} or left out, got {quoted(value)}.", param=key)
        if key not in READ and key not in ONLY and key not in WITHOUT_EFFECT:
            hint = did_you_mean(key, (*READ, *ONLY, *WITHOUT_EFFECT))
            raise RequestError(f"This server knows no field {quoted(key)}.{hint}", param=key[:100])
    return fields


def _same(value: Any, allowed: Any) -> bool:
    """Whether a value is the one that is allowed: true is no 1, which Python says it equals."""
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)


def _conversation(fields: Mapping[str, Any]) -> str | None:
    own = fields.get("plphp", {})
    name = own.get("conversation") if isinstance(own, dict) else own
    if not isinstance(own, dict) or set(own) - {"conversation"} or not isinstance(name, str | None):
        text = f'plphp must be {{"conversation": "new"}}, or name the conversation to go on with, got {quoted(own)}.'
        raise RequestError(text, param="plphp")
    return name


def _max_new_tokens(fields: Mapping[str, Any], limits: Limits) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if len(names) == 2 and fields[names[0]] != fields[names[1]]:
        raise RequestError("max_tokens and max_completion_tokens contradict each other: send one.", param="max_tokens")
    return _integer(fields, names[0], 1, limits.max_new_tokens) if names else None


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy search, unless a temperature or top_p is given, as in ``plphp generate``."""
    temperature, top_p = _number(fields, "temperature", 0), _number(fields, "top_p", 0, 1)
    # Logits are divided by the penalty or multiplied with it: beyond these bounds they overflow.
    top_k, penalty = _integer(fields, "top_k", -1), _number(fields, "repetition_penalty", 0.01, 100)
    if top_p == 0:
        raise RequestError("top_p must be above 0, got 0.", param="top_p")
    repeated = {} if penalty is None else {"repetition_penalty": penalty}
    if (temperature is None and top_p is None) or (temperature is not None and temperature < GREEDY_BELOW):
        return {"do_sample": False, **repeated}
    of_top = {} if top_k is None else {"top_k": max(top_k, 0)}
    scaled = 1.0 if temperature is None else temperature
    return {"do_sample": True, "temperature": scaled, "top_p": 1.0 if top_p is None else top_p, **of_top, **repeated}


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise RequestError(
            f"stop must be a text or a list of texts, none of them empty, got {quoted(stop)}.", param="stop"
        )
    if len(stops) > MOST_STOPS:
        raise RequestError(f"stop may hold {MOST_STOPS} texts, got {len(stops)}.", param="stop")
    return tuple(stops)


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        expected = '{"include_usage": true}'
        raise RequestError(f"stream_options must be {expected}, got {quoted(options)}.", param="stream_options")
    if options and not stream:
        raise RequestError('stream_options are for streams: send "stream": true as well.', param="stream_options")
    return _flag(options, "include_usage")


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {quoted(value)}.", param=name)
    return value


def _number(fields: Mapping[str, Any], name: str, low: float, high: float = math.inf) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or value == math.inf:
        bounds = f"of at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise RequestError(f"{name} must be a number {bounds}, got {quoted(value)}.", param=name)
    return float(value)


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int = 2**31 - 1) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be an integer between {low} and {high}, got {quoted(value)}.", param=name)
    return value
