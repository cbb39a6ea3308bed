# SPDX-License-Identifier: Apache-2.0
"""What was said in a conversation, as it is remembered: texts, and of images marks alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plphp.errors import HistoryError

from .chat_messages import HELD
from .image_marks import ImageMark, digest


@dataclass(frozen=True)
class Message:
    """A message.

    Parameters
    ----------
    role : str
        Who said it.
    parts : tuple of str or ImageMark
        Its texts and images.
    """

    role: str
    parts: tuple[str | ImageMark, ...]

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Message:
        """Remember a message whose images are there, see `plphp.serving.chat_messages.fetch_images`."""
        parts = [
            part["text"]
            if part["type"] == "text"
            else ImageMark(digest(part["image"]), digest(part["source"].encode()))
            for part in message["content"]
        ]
        return cls(message["role"], tuple(parts))

    def is_same(self, sent: Mapping[str, Any]) -> bool:
        """Whether a message that was sent is this one; clients may take blanks from around an answer."""
        if sent["role"] != self.role:
            return False
        parts = [part.get("text", part.get("image")) for part in sent["content"]]
        kinds = [part["type"] for part in sent["content"]]
        if self.role == "assistant":
            return set(kinds) <= {"text"} and "".join(parts).strip() == "".join(map(str, self.parts)).strip()
        if kinds != ["text" if isinstance(known, str) else "image" for known in self.parts]:
            return False
        pairs = zip(self.parts, parts, strict=True)
        return all(known == part if isinstance(known, str) else known.is_of(part) for known, part in pairs)


def check_goes_on(known: Sequence[Message], sent: Sequence[Mapping[str, Any]]) -> None:
    """Raise `HistoryError` unless a chat begins with what was said and asks something behind it."""
    for number, (message, again) in enumerate(zip(known, sent, strict=False), 1):
        if not message.is_same(again):
            answered = message.role == "assistant"
            known_as = "the answer that this server gave" if answered else "what was read in this conversation"
            raise HistoryError(
                f"Message {number} of the chat differs from {known_as}: send the chat as it was, "
                f"each answer with its text as it came, each image as it was sent or as {HELD!r}, with the "
                "new messages behind it; or begin a new conversation, which reads all of it."
            )
    if known and len(sent) <= len(known):
        raise HistoryError(
            f"The chat has {len(sent)} messages, and this conversation has read and answered {len(known)}: send all of "
            "them, the last answer too, with a new message behind them."
        )
