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
    """

    def __init__(self, model_name: str) -> None:
        self.name = f"chatcmpl-{uuid.uuid4().hex}"
        self._head = {"id": self.name, "created": int(time.time()), "model": model_name}

    def whole(self, text: str, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        """Return a completion."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        numbers = {"usage": usage(prompt, answer), "plphp": kept(prompt, answer)}
        return {**self._head, "object": "chat.completion", "choices": [choice], **numbers}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        """Return an event with a part of the text."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def numbers(self, prompt: Prompt, answer: Answer) -> bytes:
        """Return the event of a stream with the numbers of tokens."""
        numbers = {"usage": usage(prompt, answer), "plphp": kept(prompt, answer)}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [], **numbers})


def usage(prompt: Prompt, answer: Answer) -> dict[str, int]:
    """Return the numbers of tokens, those of images among those of the prompt."""
    total = prompt.tokens + answer.tokens
    return {"prompt_tokens": prompt.tokens, "completion_tokens": answer.tokens, "total_tokens": total}


def kept(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """Return what was kept of the vision tokens: fractions of entries and of their bytes, and bytes of the cache."""
    report = answer.report
    return {
        "vision_tokens": prompt.vision_tokens,
        "retention": round(report.retention, 4),
        "vision_held": round(report.vision_held, 4),
        "kv_bytes": report.entry_bytes,
        "kv_bytes_full": report.kv_bytes_full,
    }


def event(values: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
