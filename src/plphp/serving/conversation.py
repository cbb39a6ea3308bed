# SPDX-License-Identifier: Apache-2.0
"""A conversation whose cache waits for its next turn."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from plphp.engines.hf.ongoing_chat import OngoingChat
from plphp.errors import ConfigError
from plphp.inputs.later_turn import TurnInputs
from plphp.pruning.image_bytes import ImageBytes
from plphp.pruning.report import PruneReport
from plphp.show.chat_images import image_values

from .chat_messages import decoded_chat, fetch_images
from .options import Limits
from .refusals import RequestError
from .said import Message, check_goes_on

SEND_IMAGES = 'Send {"content": [image parts]}, with the parts of the images as in the message that brought them.'
"""What a request sends to restore an image."""
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
    image_bytes : ImageBytes
        What its images take of it under a budget.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.name = secrets.token_urlsafe(NAME_BYTES)
        self.nbytes, self.image_bytes = 0, ImageBytes()
        self._created = int(time.time())
        self._chat = OngoingChat(model, processor)
        self._messages: list[Message] = []
        self._asked: list[Message] = []

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

    def fetch_images(self, messages: list[dict[str, Any]], limits: Limits) -> None:
        """Get the new images of its next turn, in their place; what was read is compared alone.

        Parameters
        ----------
        messages : list of dict
            The whole chat, as `plphp.serving.chat_messages.read_messages` returns it.
        limits : Limits
            How many new images there may be.

        Raises
        ------
        HistoryError
            If the chat does not go on from what was said; the conversation is as before.
        PLPHPError
            See `plphp.serving.chat_messages.fetch_images`; the conversation is as before.
        """
        check_goes_on(self._messages, messages)
        fetch_images(messages, limits, len(self._messages))

    def prepare(self, messages: list[dict[str, Any]], limits: Limits) -> TurnInputs:
        """Make the inputs of its next turn; of the images those that are new are decoded.

        Parameters
        ----------
        messages : list of dict
            The whole chat, with its new images, see `fetch_images`.
        limits : Limits
            What an image may be.

        Raises
        ------
        PLPHPError
            If the chat cannot be read; the conversation is as before.
        """
        known = len(self._messages)
        self._asked = [*self._messages, *map(Message.of, messages[known:])]
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
        self._chat.keep(len(self._asked) + 1, turn, tokens, text if cut else None)
        self._messages = [*self._asked, Message("assistant", (text,))]
        self._note_bytes()

    def forget(self, image: int) -> None:
        """Free all that is held of an image, see `OngoingChat.forget`; for an unknown number raises RequestError."""
        self._check_image(image)
        self._chat.forget(image)
        self._note_bytes()

    def restore(self, image: int, pictures: Sequence[Image.Image]) -> None:
        """Bring an image back, see `OngoingChat.restore`; for an unknown number, or without pictures where those are
        needed, raises RequestError."""
        self._check_image(image)
        try:
            self._chat.restore(image, pictures)
        except ConfigError as error:
            if pictures:
                raise
            # What the cache asks for are the features that a processor makes of the picture.
            text = f"To restore an image takes its picture, and there is none. {SEND_IMAGES}"
            raise RequestError(text, param="content") from error
        self._note_bytes()

    def _note_bytes(self) -> None:
        self.nbytes, self.image_bytes = self._chat.nbytes, self._chat.image_bytes

    def _check_image(self, image: int) -> None:
        count = 0 if self._chat.cache is None else len(self._chat.cache.images)
        if image >= count:
            images = "1 image" if count == 1 else f"{count} images"
            text = f"The conversation has read {images}, numbered from 0, and none of the number {image}."
            raise RequestError(text, status=404, code="image_not_found")

    def settle(self) -> None:
        """End a turn that was kept: its client has got the reply."""
        self._chat.settle()

    def take_back(self) -> None:
        """Return to where it was when a turn was settled last; where that cannot be, it is over."""
        self._chat.take_back()
        self._messages = self._messages[: self._chat.said.messages]
        self._note_bytes()

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


def _without_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose images were read, which a chat template writes as slots."""
    return [
        {
            **message,
            "content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]],
        }
        for message in messages
    ]
