# SPDX-License-Identifier: Apache-2.0
"""A conversation whose cache waits for its next turn, and the comparison of what a client sends with what was said."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from plphp.engines.hf.ongoing_chat import OngoingChat
from plphp.errors import HistoryError
from plphp.inputs.later_turn import TurnInputs
from plphp.pruning.report import PruneReport
from plphp.show.images_held import image_values

from .chat_messages import decoded_chat
from .options import Limits
from .refusals import RequestError

Marked = tuple[str, tuple[tuple[str, str], ...]]
"""A message as it is remembered: its role, and of each part the kind, and its text or the SHA-256 of its image."""
NAME_BYTES = 24
"""Random bytes of a name: whoever knows it may go on with the conversation, and nobody guesses it."""


class Conversation:
    """A conversation of one client.

    Parameters
    ----------
    model : PreTrainedModel
        The model, with a session.
    processor : ProcessorMixin
        Its processor.

    Attributes
    ----------
    name : str
        What the client calls it.
    nbytes : int
        Bytes of its cache after its newest turn.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.name = secrets.token_urlsafe(NAME_BYTES)
        self.nbytes = 0
        self._created = int(time.time())
        self._chat = OngoingChat(model, processor)
        self._messages: list[Marked] = []
        self._asked: list[Marked] = []

    @property
    def turns(self) -> int:
        """Turns that were answered."""
        return self._chat.said.turns

    @property
    def held(self) -> int:
        """Tokens that its cache holds."""
        return self._chat.said.held

    @property
    def over(self) -> bool:
        """Whether it takes no further turn."""
        return self._chat.over

    @property
    def report(self) -> PruneReport:
        """The report of its cache."""
        return self._chat.report()

    def prepare(self, messages: list[dict[str, Any]], limits: Limits) -> TurnInputs:
        """Make the inputs of its next turn; of the images those that are new are decoded.

        Parameters
        ----------
        messages : list of dict
            The whole chat, as `plphp.serving.chat_messages.read_messages` returns it.
        limits : Limits
            What an image may be.

        Raises
        ------
        HistoryError
            If the chat does not go on from what was said; the conversation is as before.
        PLPHPError
            If the chat cannot be read; the conversation is as before.
        """
        asked = [_marked(message) for message in messages]
        known = len(self._messages)
        self._check(asked)
        self._asked = asked
        return self._chat.prepare([*_without_images(messages[:known]), *decoded_chat(messages, limits, known)])

    def generate(self, turn: TurnInputs, **options: Any) -> list[int]:
        """Read a turn, and write its answer; return its tokens."""
        return self._chat.generate(turn, **options)

    def keep(self, turn: TurnInputs, tokens: list[int], text: str, cut: bool) -> None:
        """Keep a turn.

        Parameters
        ----------
        turn : TurnInputs
            The turn.
        tokens : list of int
            Those of its answer.
        text : str
            Its answer, as the client got it.
        cut : bool
            Whether the tokens have more text than that.

        Raises
        ------
        UnsupportedFeatureError
            If the cache cannot be cut; `take_back` the turn.
        """
        answer: Marked = ("assistant", (("text", text),))
        self._chat.keep(len(self._asked) + 1, turn, tokens, text if cut else None)
        self._messages = [*self._asked, answer]
        self.nbytes = self._chat.nbytes

    def forget(self, image: int) -> None:
        """Free all that is held of an image, see `OngoingChat.forget`; for an unknown number raises RequestError."""
        self._check_image(image)
        self._chat.forget(image)
        self.nbytes = self._chat.nbytes

    def restore(self, image: int, pictures: Sequence[Image.Image]) -> None:
        """Bring an image back, see `OngoingChat.restore`; for an unknown number raises RequestError."""
        self._check_image(image)
        self._chat.restore(image, pictures)
        self.nbytes = self._chat.nbytes

    def _check_image(self, image: int) -> None:
        count = 0 if self._chat.cache is None else len(self._chat.cache.images)
        if image >= count:
            text = f"The conversation has read {count} images, numbered from 0, and none of the number {image}."
            raise RequestError(text, status=404, code="image_not_found")

    def settle(self) -> None:
        """End a turn that was kept: its client has got the reply."""
        self._chat.settle()

    def take_back(self) -> None:
        """Return to where it was when a turn was settled last; where that cannot be, it is over."""
        self._chat.take_back()
        self._messages = self._messages[: self._chat.said.messages]
        self.nbytes = self._chat.nbytes

    def card(self) -> dict[str, Any]:
        """What is told of it to the client."""
        report = self.report
        return {
            "id": self.name,
            "object": "conversation",
            "created_at": self._created,
            "turns": self.turns,
            "messages": len(self._messages),
            "tokens": self.held,
            "kv_bytes": report.entry_bytes,
            "kv_bytes_full": report.kv_bytes_full,
            "images": image_values(report),
        }

    def _check(self, asked: list[Marked]) -> None:
        """Raise `HistoryError` unless a chat begins with what was said and asks something behind it."""
        for number, (known, sent) in enumerate(zip(self._messages, asked, strict=False), 1):
            if not _same(known, sent):
                answer = " the answer that this server gave," if known[0] == "assistant" else ""
                raise HistoryError(
                    f"Message {number} of the chat differs from{answer} what was read in this conversation: send the "
                    "chat as it was, each answer with its text as it came, with the new messages behind it; or begin a "
                    "new conversation, which reads all of it."
                )
        if self._messages and len(asked) <= len(self._messages):
            raise HistoryError(
                f"The chat has {len(asked)} messages, and this conversation has read and answered "
                f"{len(self._messages)}: send all of them, the last answer too, with a new message behind them."
            )


def _marked(message: dict[str, Any]) -> Marked:
    return message["role"], tuple((part["type"], _mark(part)) for part in message["content"])


def _mark(part: dict[str, Any]) -> str:
    if part["type"] == "text":
        return str(part["text"])
    return hashlib.sha256(part["image"]).hexdigest()


def _same(known: Marked, sent: Marked) -> bool:
    """Whether a message is the one that was read; clients may take blanks from around an answer."""
    if known[0] != "assistant" or sent[0] != "assistant":
        return known == sent
    texts = ["".join(text for kind, text in parts if kind == "text").strip() for _, parts in (known, sent)]
    return texts[0] == texts[1] and all(kind == "text" for kind, _ in sent[1])


def _without_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose images were read, which a chat template writes as slots."""
    return [
        {
            **message,
            "content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]],
        }
        for message in messages
    ]
