# SPDX-License-Identifier: Apache-2.0
"""The messages of a request: a chat whose images come with it or from the web, and never from the server's files."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image

from plphp.errors import PLPHPError
from plphp.inputs.chat import normalized, parts_of
from plphp.inputs.fetching import WebAddress, fetch
from plphp.inputs.image_source import find_image
from plphp.inputs.media import load_image
from plphp.io.quoting import quoted

from .options import Limits
from .refusals import RequestError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""By role of a message, what chat templates call it."""
CHARACTERS_PER_TOKEN = 32
"""Characters that a token may stand for at most: a text that is far too long is not tokenized to be told so."""

HELD = "held:"
"""In the place of an image's address: a conversation has read the image, and nothing is sent of it."""

_FROM_OUTSIDE = re.compile(r"\s*(?:data:|https?://)", re.IGNORECASE)


def read_messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    """Check the messages of a request, before anything is fetched or decoded.

    Parameters
    ----------
    messages : object
        Of a request.
    limits : Limits
        How long the chat may be, and whether images may be fetched.

    Returns
    -------
    list of dict
        As `plphp.inputs.chat.normalized` returns them; images are data: URIs, addresses, or `HELD`.

    Raises
    ------
    RequestError
        If there are videos, or an image has no source that clients may name.
    PLPHPError
        If the messages are not a chat.
    """
    if not isinstance(messages, list):
        raise RequestError(f"messages must be a list, got {quoted(messages)}.", param="messages")
    chat = normalized([_plain_message(message, number) for number, message in enumerate(messages, 1)])
    _check_text(chat, limits)
    for origin, _ in parts_of(chat, "video"):
        raise RequestError(f"{origin}: this server reads no videos: send some frames as images.", param="messages")
    for origin, part in parts_of(chat, "image"):
        part["image"] = _source(part.get("image"), origin, limits)
    return chat


def fetch_images(chat: list[dict[str, Any]], limits: Limits, first: int = 0) -> None:
    """Get the images of a chat, in its place, from the message of the index ``first`` on: what was read stays as it is.

    Then "image" is the file of an image, bytes, and "source" is where it came from. All that is fetched may be as large
    as a request.

    Raises
    ------
    RequestError
        If there are too many, or one is said to be held.
    PLPHPError
        If one is none, or cannot be fetched.
    """
    read = sum(1 for _ in parts_of(chat[:first], "image"))
    images = list(parts_of(chat, "image"))[read:]
    if len(images) > limits.max_images:
        new = " new" if read else ""
        text = f"The chat has {len(images)}{new} images, and this server reads {limits.max_images} at most."
        raise RequestError(text, param="messages")
    left = limits.max_body_bytes
    for origin, part in images:
        source = part["image"]
        if source == HELD:
            raise RequestError(
                f"{origin}: this image is said to be held ({HELD!r}), and no conversation of this request has read it: "
                "send the image.",
                param="messages",
            )
        try:
            content = content_of(source, allow_urls=limits.allow_urls)
            if isinstance(content, WebAddress):
                content = fetch(content, max_bytes=left)
                left -= len(content)
        except PLPHPError as error:
            raise type(error)(f"{origin}: {error}") from error
        part.update(image=content, source=source)


def content_of(source: str, *, allow_urls: bool) -> bytes | WebAddress:
    """The file in a data: URI, or the address to fetch it from.

    Raises
    ------
    PLPHPError
        If there is none.
    """
    content = find_image(source, allow_urls=allow_urls).content
    if not isinstance(content, (bytes, WebAddress)):
        raise RequestError("The image must come with the request.", param="messages")
    return content


def decoded_chat(chat: list[dict[str, Any]], limits: Limits, first: int = 0) -> list[dict[str, Any]]:
    """Return a chat with its images decoded, from the message of the index ``first`` on.

    Raises
    ------
    PLPHPError
        If one is broken or has too many pixels.
    """
    return [
        {
            **message,
            "content": [
                _decoded_part(part, f"Message {number} of the chat, part {index}", limits)
                for index, part in enumerate(message["content"], 1)
            ],
        }
        for number, message in enumerate(chat[first:], first + 1)
    ]


def _decoded_part(part: dict[str, Any], origin: str, limits: Limits) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    try:
        image: Image.Image = load_image(part["image"], max_pixels=limits.max_image_pixels)
    except PLPHPError as error:
        raise type(error)(f"{origin}: {error}") from error
    return {"type": "image", "image": image}


def _plain_message(message: Any, number: int) -> Any:
    """A message with its role and content alone, as clients send back what they were sent, with empty fields."""
    if not isinstance(message, dict):
        return message  # `normalized` says what is wrong
    values = {key: value for key, value in message.items() if value not in (None, [], "") or key == "content"}
    role = values.get("role")
    if isinstance(role, str) and role not in ROLES:
        known = ", ".join(ROLES)
        raise RequestError(f"Message {number} has the role {quoted(role)}: known are {known}.", param="messages")
    further = sorted(set(values) - {"role", "content", "name"})
    if further:
        text = f"Message {number} has {quoted(further[0])}, which this server cannot read: leave it out."
        raise RequestError(text, param="messages")
    return {"role": ROLES[role] if isinstance(role, str) else role, "content": values.get("content")}


def _check_text(chat: list[dict[str, Any]], limits: Limits) -> None:
    texts = [part["text"] for _, part in parts_of(chat, "text")]
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may hold halves of characters, and tokenizers may not
            raise RequestError(f"A text is no Unicode: {error.reason}.", param="messages") from error
    length = sum(map(len, texts))
    if limits.max_model_len is not None and length > CHARACTERS_PER_TOKEN * limits.max_model_len:
        text = f"The chat has {length:,} characters, far more than {limits.max_model_len} tokens."
        raise RequestError(text, param="messages", code="context_length_exceeded")


def _source(source: Any, origin: str, limits: Limits) -> str:
    if isinstance(source, str) and source.strip() == HELD:
        return HELD
    if not isinstance(source, str) or not _FROM_OUTSIDE.match(source):
        urls = " or an http or https address" if limits.allow_urls else ""
        text = f"{origin}: the image must be a data: URI{urls}, got {quoted(source)}."
        raise RequestError(text, param="messages")
    return source
