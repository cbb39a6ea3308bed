# SPDX-License-Identifier: Apache-2.0
"""What a task asks about one of its documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from plphp.errors import PLPHPError
from plphp.inputs.chat import KINDS, Messages, normalized, parts_of
from plphp.inputs.media import load_image


@dataclass(frozen=True)
class Document:
    """A chat that the model is to answer.

    Parameters
    ----------
    name : str
        Task and number, for messages.
    chat : sequence of mapping
        Messages as tasks write them: entries with a "type", and the source of an image or a video under "url".
    """

    name: str
    chat: Messages

    @property
    def media(self) -> tuple[bool, ...]:
        """By the kinds of media, whether the chat has any."""
        contents = [message["content"] for message in self.chat if not isinstance(message["content"], str)]
        types = {entry.get("type") for content in contents for entry in content}
        return tuple(kind in types for kind in KINDS)


def downsampled(chat: Messages, factor: int) -> Messages:
    """Divide both sides of every image of a chat by a factor, as VTC-Bench does (arXiv:2510.07143)."""
    if factor == 1:
        return chat
    chat = normalized(chat)
    for _, part in parts_of(chat, "image"):
        image = load_image(part["image"])
        part["image"] = image.resize([max(1, side // factor) for side in image.size])
    return chat


@contextmanager
def named_after(documents: Sequence[Document]) -> Iterator[None]:
    """Begin the errors of a batch with the names of its documents."""
    try:
        yield
    except PLPHPError as error:
        raise type(error)(f"{'; '.join(document.name for document in documents)}: {error}") from error
