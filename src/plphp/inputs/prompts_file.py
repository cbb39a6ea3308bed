# SPDX-License-Identifier: Apache-2.0
"""Prompts from a file of JSON objects: what ``plphp profile``, ``calibrate``, ``collect`` and ``report`` run on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, device

from plphp.errors import LoadError, PLPHPError
from plphp.io.json_lines import read_entries
from plphp.io.quoting import quoted

from .chat import chat_in
from .image_source import located_images
from .media import load_image
from .prompt import build_inputs


@dataclass(frozen=True)
class Prompt:
    """A prompt of a file.

    Parameters
    ----------
    images : tuple
        Sources of the images for `plphp.inputs.media.load_image`, in prompt order.
    question : str, optional
        A single user turn, after the images.
    turns : list of dict, optional
        A chat in the place of the question; see `plphp.inputs.prompt.build_inputs`.
    origin : str
        Where the prompt stands, for messages: file and line.
    answers : tuple of str
        Answers that are right, for ``plphp report``; empty where the file names none.
    """

    images: tuple[Any, ...]
    question: str | None = None
    turns: list[dict[str, Any]] | None = None
    origin: str = "the prompt"
    answers: tuple[str, ...] = ()

    def read_images(self) -> list[Image.Image]:
        """Read the images.

        Raises
        ------
        LoadError
            If an image cannot be read; the message names the prompt's origin.
        """
        try:
            return [load_image(image) for image in self.images]
        except LoadError as error:
            raise LoadError(f"{self.origin}: {error}") from error


def read_prompts(path: str | Path, *, allow_urls: bool = False) -> list[Prompt]:
    """Read prompts from a file.

    Parameters
    ----------
    path : str or Path
        JSON Lines: an object a line with ``"question"`` (text), or ``"turns"`` (a chat, a list of ``{"role": ...,
        "content": ...}``, see `plphp.inputs.chat.normalized`), and ``"images"`` (a list of what
        `plphp.inputs.media.load_image` takes, paths relative to the file; ``"image"`` or ``"file_name"`` for a single
        image), and, if it is known, ``"answer"`` or ``"answers"`` (text, or a list of texts that are all right). A JSON
        file that is a list of such objects will do, too. Further keys, answers that are no text, and empty lines are
        ignored.
    allow_urls : bool
        Whether http and https addresses of images may be fetched, when they are needed.

    Returns
    -------
    list of Prompt
        A prompt or more, whose image files all exist.

    Raises
    ------
    LoadError
        If the file cannot be read, or an entry is not a prompt; the message names the line.
    """
    folder = Path(path).parent
    prompts = [_prompt(values, origin, folder, allow_urls) for _, origin, values in read_entries(path, "prompts")]
    if not prompts:
        raise LoadError(f"The file {path} holds no prompts.")
    return prompts


def prompt_inputs(processor: Any, prompts: Iterable[Prompt], on: device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Make the inputs of ``generate`` for prompt after prompt, each when the iterator comes to it.

    Parameters
    ----------
    processor : ProcessorMixin
        Processor of the model.
    prompts : iterable of Prompt
        Prompts as `read_prompts` returns them.
    on : device or str
        Device of the tensors.

    Yields
    ------
    dict
        Inputs as `plphp.inputs.prompt.build_inputs` makes them.

    Raises
    ------
    PLPHPError
        Of the kind that `build_inputs` and `load_image` raise, with the origin of the prompt.
    """
    for prompt in prompts:
        images = prompt.read_images()
        try:
            inputs = build_inputs(processor, prompt.question, messages=prompt.turns, images=images)
        except PLPHPError as error:
            raise type(error)(f"{prompt.origin}: {error}") from error
        yield {name: value.to(on) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _prompt(values: Any, origin: str, folder: Path, allow_urls: bool) -> Prompt:
    if not isinstance(values, dict):
        raise LoadError(f'{origin}: expected an object with "question" and "images", got {quoted(values)}.')
    question, turns = values.get("question"), values.get("turns")
    if (question is None) == (turns is None):
        raise LoadError(f'{origin}: expected either "question" or "turns", got {", ".join(values) or "nothing"}.')
    if turns is None and (not isinstance(question, str) or not question.strip()):
        raise LoadError(f'{origin}: "question" must be text, got {quoted(question)}.')
    if turns is not None and (not isinstance(turns, list) or not turns):
        raise LoadError(f'{origin}: "turns" must be a list of messages, got {quoted(turns)}.')
    try:
        images = located_images(values, folder=folder, allow_urls=allow_urls)
        chat = None if turns is None else chat_in(folder, turns, allow_urls=allow_urls)
    except PLPHPError as error:
        raise LoadError(f"{origin}: {error}") from error
    if turns is None and not images:
        raise LoadError(f'{origin}: "images" is missing or empty: a list of image files, relative to the file.')
    return Prompt(images, question, chat, origin, _answers(values))


def _answers(values: dict[str, Any]) -> tuple[str, ...]:
    """The right answers of an entry. What is no text is left out: most commands need no answer, and are not to fail."""
    listed = values.get("answers", values.get("answer"))
    return tuple(answer for answer in (listed if isinstance(listed, list) else [listed]) if isinstance(answer, str))
