# SPDX-License-Identifier: Apache-2.0
"""Prompts from a file, one JSON object each: what ``plphp profile`` and ``plphp calibrate`` measure on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, device

from .errors import ConfigError, LoadError, PLPHPError
from .media import load_image
from .prompt import build_inputs, chat_in


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Parameters
    ----------
    images : tuple of Path
        Image files, in prompt order.
    question : str, optional
        One user turn, after the images.
    turns : list of dict, optional
        A chat in the place of the question; see `plphp.prompt.build_inputs`.
    origin : str
        Where it stands, for messages: file and line.
    """

    images: tuple[Path, ...]
    question: str | None = None
    turns: list[dict[str, Any]] | None = None
    origin: str = "the prompt"


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a file.

    Parameters
    ----------
    path : str or Path
        JSON Lines: an object a line with ``"question"`` (text), or ``"turns"`` (a chat, a list of ``{"role": ...,
        "content": ...}``), and ``"images"`` (a list of paths, relative to the file). A JSON file that is one list
        of such objects will do, too. Other keys, such as ``"answer"``, are ignored, and so are empty lines.

    Returns
    -------
    list of Prompt
        At least one; all image files are there.

    Raises
    ------
    LoadError
        If the file cannot be read, or one of its entries is not a prompt; the message names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"Cannot read the prompts {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"The prompts {path} are not UTF-8 text: {error}.") from error
    prompts = [_prompt(values, origin, path.parent) for origin, values in _entries(path, text)]
    if not prompts:
        raise LoadError(f"The file {path} holds no prompts.")
    return prompts


def prompt_inputs(processor: Any, prompts: Iterable[Prompt], on: device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Make the inputs of ``generate`` for one prompt after the other, when it is asked for.

    Parameters
    ----------
    processor : ProcessorMixin
        Of the model.
    prompts : iterable of Prompt
        See `read_prompts`.
    on : device or str
        Where the tensors go.

    Yields
    ------
    dict
        See `plphp.prompt.build_inputs`.

    Raises
    ------
    PLPHPError
        Of the kind that `build_inputs` and `load_image` raise, with the origin of the prompt.
    """
    for prompt in prompts:
        try:
            images = [load_image(image) for image in prompt.images]
            inputs = build_inputs(processor, prompt.question, messages=prompt.turns, images=images)
        except PLPHPError as error:
            raise type(error)(f"{prompt.origin}: {error}") from error
        yield {name: value.to(on) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _entries(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The values of the file with their places."""
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise LoadError(f"The prompts {path} are neither JSON Lines nor a JSON list: {error}.") from error
        yield from ((f"{path}, entry {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except ValueError as error:
                raise LoadError(f"{path}, line {number}: not JSON: {error}.") from error


def _prompt(values: Any, origin: str, folder: Path) -> Prompt:
    if not isinstance(values, dict):
        raise LoadError(f'{origin}: expected an object with "question" and "images", got {values!r:.60}.')
    question, turns = values.get("question"), values.get("turns")
    if (question is None) == (turns is None):
        raise LoadError(f'{origin}: expected either "question" or "turns", got {", ".join(values) or "nothing"}.')
    if turns is None and (not isinstance(question, str) or not question.strip()):
        raise LoadError(f'{origin}: "question" must be text, got {question!r:.60}.')
    names = values.get("images", [] if turns is not None else None)
    if names is None:
        raise LoadError(f'{origin}: "images" is missing: a list of image files, relative to the file.')
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LoadError(f'{origin}: "images" must be a list of paths, got {names!r:.60}.')
    if turns is None and not names:
        raise LoadError(f'{origin}: "images" is empty: a prompt without an image has nothing to measure.')
    chat = None if turns is None else _chat(turns, origin, folder)
    named = [Path(part["path"]) for message in chat or () for part in message["content"] if _is_file_image(part)]
    images = tuple(folder / name for name in names)
    for image in (*images, *named):
        if not image.is_file():
            raise LoadError(f"{origin}: there is no image file {image}.")
    return Prompt(images, question, chat, origin)


def _is_file_image(part: dict[str, Any]) -> bool:
    return part["type"] == "image" and "path" in part


def _chat(turns: Any, origin: str, folder: Path) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not turns:
        raise LoadError(f'{origin}: "turns" must be a list of messages, got {turns!r:.60}.')
    try:
        return chat_in(folder, turns)
    except ConfigError as error:
        raise LoadError(f"{origin}: {error}") from error
