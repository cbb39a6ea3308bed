# SPDX-License-Identifier: Apache-2.0
"""What clients get: completions and chunks in the form of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from .served_model import Answer, Prompt

DONE = b"data: [DONE]\n\n"


class Reply:
    """Makes the parts of a reply, which share a name and a time.

    Parameters
    ----------
    model_name : str
        The model that is served.
    in_conversation : bool
        Whether it is of a conversation, whose name it says then.
    """

    def __init__(self, model_name: str, in_conversation: bool = False) -> None:
        self._in_conversation = in_conversation
        self.name = f"chatcmpl-{uuid.uuid4().hex}"
        self._head = {"id": self.name, "created": int(time.time()), "model": model_name}

    def whole(self, text: str, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        """Return a completion."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], **self._numbers(prompt, answer)}

    def chunk(self, delta: dict[str, str]) -> bytes:
        """Return an event with a part of the text."""
        choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": None}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def last(self, answer: Answer) -> bytes:
        """Return the event behind the text, with why it ends and what the conversation is called."""
        choice = {"index": 0, "delta": {}, "finish_reason": answer.finish_reason, "logprobs": None}
        name = self._name(answer)
        own = {"plphp": name} if name else {}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **own})

    def numbers(self, prompt: Prompt, answer: Answer) -> bytes:
        """Return the event of a stream with the numbers of tokens."""
        numbers = self._numbers(prompt, answer)
        return event({**self._head, "object": "chat.completion.chunk", "choices": [], **numbers})

    def _numbers(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        return {"usage": usage(prompt, answer), "plphp": {**kept(prompt, answer), **self._name(answer)}}

    def _name(self, answer: Answer) -> dict[str, str | None]:
        """The conversation that the client may go on with; None where it is over."""
        return {"conversation": answer.conversation} if self._in_conversation else {}


def usage(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """Return the numbers of tokens, those of images and those that a conversation holds among those of the prompt."""
    total = prompt.tokens + answer.tokens
    numbers = {"prompt_tokens": prompt.tokens, "completion_tokens": answer.tokens, "total_tokens": total}
    return {**numbers, "prompt_tokens_details": {"cached_tokens": prompt.held}} if prompt.held else numbers


def kept(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """Return what was kept of the vision tokens: fractions of entries and of their bytes, and bytes of the cache.

    Under a budget also the numbers of the images that the answer turns to though they have faded.
    """
    report = answer.report
    wanted = {"wanted": [image.number for image in report.wanted]} if report.budget_bytes else {}
    return {
        "vision_tokens": prompt.vision_tokens,
        "retention": round(report.retention, 4),
        "vision_held": round(report.vision_held, 4),
        "kv_bytes": report.entry_bytes,
        "kv_bytes_full": report.kv_bytes_full,
        **wanted,
    }


def event(values: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
