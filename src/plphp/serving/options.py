# SPDX-License-Identifier: Apache-2.0
"""What a server allows its clients, and where it listens."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from plphp.errors import ConfigError
from plphp.io.quoting import quoted
from plphp.settings.checks import check_int

MAY_BE_NONE = ("max_images", "conversations")
"""Limits that may be 0."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Parameters
    ----------
    max_model_len : int, optional
        Tokens of a prompt and its answer together; default: the positions that the model knows.
    max_new_tokens : int
        Tokens of an answer at most, and of one whose request names no number.
    max_images : int
        Images of a request.
    max_image_pixels : int
        Pixels of an image.
    max_body_bytes : int
        Bytes of a request, and of all that is fetched for it.
    max_queue : int
        Requests at once, the one that is being answered included.
    body_seconds : int
        Seconds until a request has to have arrived.
    allow_urls : bool
        Whether images are fetched from http and https addresses.
    conversations : int
        Conversations whose caches are held for their next turn; 0 for none.
    conversation_bytes : int
        Bytes that these caches hold at most, all together, between two answers.

    Raises
    ------
    ConfigError
        If a number is no integer, or too small.
    """

    max_model_len: int | None = None
    max_new_tokens: int = 1024
    max_images: int = 16
    max_image_pixels: int = 50_000_000
    max_body_bytes: int = 64 * 2**20
    max_queue: int = 64
    body_seconds: int = 60
    allow_urls: bool = False
    conversations: int = 0
    conversation_bytes: int = 2 * 10**9

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "allow_urls" and not (field.name == "max_model_len" and value is None):
                check_int(field.name, value, minimum=0 if field.name in MAY_BE_NONE else 1)


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and to whom.

    Parameters
    ----------
    host : str
        Name or IP address of the network interface.
    port : int
        TCP port; 0 for any that is free.
    api_key : str, optional
        What clients have to send as their key; default: none is asked for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None


def images_per_prompt(text: str) -> int:
    """Read how many images a request may have from the value of ``--limit-mm-per-prompt``, as vLLM has it.

    Raises
    ------
    ConfigError
        If it is not an object of JSON such as ``{"image": 3}``, or asks for another kind than images.
    """
    expected = f"""--limit-mm-per-prompt must be like '{{"image": 3}}', got {quoted(text)}."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(expected) from error
    if not isinstance(values, dict) or "image" not in values:
        raise ConfigError(expected)
    others = sorted(kind for kind, count in values.items() if kind != "image" and count != 0)
    if others:
        raise ConfigError(f"{expected} The transformers engine serves images alone, not {', '.join(others)}.")
    check_int("--limit-mm-per-prompt", values["image"], minimum=0)
    return int(values["image"])
