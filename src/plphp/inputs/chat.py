# SPDX-License-Identifier: Apache-2.0
"""Chats as transformers and OpenAI's clients write them, brought to a single form; unknown entries are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError, LoadError, PLPHPError, did_you_mean
from plphp.io.json_files import read_json
from plphp.io.quoting import quoted

from .image_source import find_video, located_image, named_source

Messages = Sequence[Mapping[str, Any]]
KINDS = ("image", "video")
"""What the entries of a message may be beside text."""

_TYPES = {"text": "text", **{name: kind for kind in KINDS for name in (kind, f"{kind}_url")}}


def read_chat(path: str | Path, *, allow_urls: bool = False) -> list[dict[str, Any]]:
    """Read a chat from a JSON file: a list of ``{"role": ..., "content": ...}``.

    Parameters
    ----------
    path : str or Path
        The file. Its images are as in `normalized`; a relative path, under whatever key, starts at its folder.
    allow_urls : bool
        Whether http and https addresses in the chat may be fetched.

    Returns
    -------
    list of dict
        The messages, as `chat_in` returns them.

    Raises
    ------
    LoadError
        If the file cannot be read or is not a chat, or there is no such image.
    """
    messages = read_json(path, "chat")
    if not isinstance(messages, list):
        hint = ': write its "messages" alone' if isinstance(messages, dict) and "messages" in messages else ""
        raise LoadError(f"The chat {path} must be a list of messages, got a {type(messages).__name__}{hint}.")
    try:
        return chat_in(Path(path).parent, messages, allow_urls=allow_urls)
    except PLPHPError as error:
        raise LoadError(f"The chat {path}: {error}") from error


def chat_in(folder: Path, messages: Messages, *, allow_urls: bool = False) -> list[dict[str, Any]]:
    """Copy a chat whose relative paths start at a folder.

    Parameters
    ----------
    folder : Path
        Where relative paths start.
    messages : sequence of mapping
        The chat, see `normalized`.
    allow_urls : bool
        Whether http and https addresses in the chat may be fetched.

    Returns
    -------
    list of dict
        Messages in the form of `normalized`, every path a `Path`, every address that may be fetched a `WebAddress`.

    Raises
    ------
    ConfigError
        If the messages are not a chat.
    LoadError
        If there is no such image or video, or it is an address that may not be fetched.
    """
    chat = normalized(messages)
    for kind, find in (("image", located_image), ("video", find_video)):
        for origin, part in parts_of(chat, kind):
            if kind in part:
                try:
                    part[kind] = find(part[kind], folder=folder, allow_urls=allow_urls)
                except PLPHPError as error:
                    raise type(error)(f"{origin}: {error}") from error
    return chat


def normalized(messages: Messages) -> list[dict[str, Any]]:
    """Copy a chat, with the content of every message as a list of entries of three kinds.

    Parameters
    ----------
    messages : sequence of mapping
        ``{"role": ..., "content": ...}`` each. The content is text, or a list of entries:
        ``{"type": "text", "text": ...}``;
        ``{"type": "image"}``, alone or with "path", "url", "image" or "base64";
        ``{"type": "image_url", "image_url": ...}``, with text or ``{"url": ...}``; and the same with "video" for
        "image", without base64. Of an entry without a "type", its key says the type. Keys whose value is None count as
        absent.

    Returns
    -------
    list of dict
        Entries are ``{"type": "text", "text": ...}``, ``{"type": "image"}`` or ``{"type": "image", "image": source}``,
        where `plphp.inputs.media.load_image` takes the source, or the same with "video".

    Raises
    ------
    ConfigError
        If the messages are not a chat or are empty, or an entry is of another kind or has an unknown key, which the
        error names.
    """
    result: list[dict[str, Any]] = []
    if not messages:
        raise ConfigError("The chat holds no messages.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(
                f'Message {number} of the chat must be {{"role": ..., "content": ...}}, got {quoted(message)}.'
            )
        content = message.get("content")
        entries = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in entries):
            raise ConfigError(
                f'The content of message {number} of the chat must be text or a list of {{"type": ...}} '
                f"entries, got {quoted(content)}."
            )
        parts = [_normalized_entry(entry, _origin(number, index)) for index, entry in enumerate(entries, 1)]
        result.append({**message, "content": parts})
    return result


def parts_of(messages: Messages, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entries of a kind in a normalized chat, each after its origin, which names the entry in errors."""
    for number, message in enumerate(messages, 1):
        for index, part in enumerate(message["content"], 1):
            if part["type"] == kind:
                yield _origin(number, index), part


def _origin(message: int, part: int) -> str:
    return f"Message {message} of the chat, part {part}"


def _normalized_entry(entry: Mapping[str, Any], origin: str) -> dict[str, Any]:
    values = {key: value for key, value in entry.items() if value is not None}
    name = values.pop("type") if "type" in values else next((key for key in _TYPES if key in values), None)
    if not isinstance(name, str) or name not in _TYPES:
        advice = f"{did_you_mean(str(name), _TYPES)} Sounds and files are not read." if name is not None else ""
        raise ConfigError(f'{origin}: plphp knows no "type" {quoted(name)}, got {quoted(dict(entry))}.{advice}')
    kind = _TYPES[name]
    if kind == "text":
        if set(values) != {"text"} or not isinstance(values["text"], str):
            raise ConfigError(f'{origin}: expected {{"type": "text", "text": ...}}, got {quoted(dict(entry))}.')
        return {"type": "text", "text": values["text"]}
    try:
        source = named_source(values, kind)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    if source is None and name != kind:
        raise ConfigError(f"{origin}: {name!r} is missing, got {quoted(dict(entry))}.")
    return {"type": kind} if source is None else {"type": kind, kind: source}
