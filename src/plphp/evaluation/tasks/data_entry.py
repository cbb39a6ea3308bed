# SPDX-License-Identifier: Apache-2.0
"""What a line of a file and a row of a data set have in common: turns, accepted answers, images that open late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from plphp.errors import LoadError, PLPHPError
from plphp.inputs.media import load_image
from plphp.io.quoting import quoted

from .task import Maker, Turn


@dataclass(frozen=True)
class Entry:
    """A sample of the user's data before its images are read.

    Parameters
    ----------
    group : str
        Group that the data names; empty where it names none.
    maker : callable
        Makes the sample.
    several : bool
        Whether more than one answer is accepted.
    error : LoadError, optional
        Why the maker cannot succeed, where that is known already.
    """

    group: str
    maker: Maker
    several: bool
    error: LoadError | None = None


def read_turns(values: Mapping[str, Any], origin: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Read the turns of an entry, and the accepted answers of the last turn.

    Parameters
    ----------
    values : mapping
        ``"turns"``, or ``"question"`` with ``"answer"`` or ``"answers"``.
    origin : str
        Where the entry stands, for messages.

    Raises
    ------
    LoadError
        If a question or an answer is missing or not text.
    """
    listed = values.get("turns")
    if listed is None:
        listed = [{key: values[key] for key in ("question", "answer", "answers") if key in values}]
    if not isinstance(listed, list) or not listed or not all(isinstance(turn, dict) for turn in listed):
        raise LoadError(
            f'{origin}: "turns" must be a list of objects with "question" and "answer", got {quoted(listed)}.'
        )
    turns: list[Turn] = []
    accepted: tuple[str, ...] = ()
    for turn in listed:
        question = turn.get("question")
        if not isinstance(question, str) or not question.strip():
            raise LoadError(f'{origin}: "question" must be text, got {quoted(question)}.')
        accepted = _accepted(turn.get("answers", turn.get("answer")), origin)
        turns.append(Turn(question, accepted[0], bool(turn.get("scored", True))))
    return tuple(turns), accepted


def open_images(
    sources: Iterable[Any], origin: str, *, folder: Path | None = None, allow_urls: bool = False
) -> tuple[Image.Image, ...]:
    """Open the images of an entry.

    Raises
    ------
    LoadError
        If an image cannot be read; the message names the entry's origin.
    """
    try:
        return tuple(load_image(source, folder=folder, allow_urls=allow_urls) for source in sources)
    except PLPHPError as error:
        raise LoadError(f"{origin}: {error}") from error


def _accepted(answer: Any, origin: str) -> tuple[str, ...]:
    answers = [answer] if isinstance(answer, (str, int, float)) else list(answer or [])
    texts = tuple(dict.fromkeys(str(text).strip() for text in answers))
    if not texts or not all(texts):
        raise LoadError(
            f'{origin}: "answer" is missing or empty (got {quoted(answer)}): a sample needs one to be scored.'
        )
    return texts
