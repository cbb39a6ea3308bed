# SPDX-License-Identifier: Apache-2.0
"""A chat that one cache goes on with from turn to turn: whole after every turn, or over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from plphp.errors import CacheStateError, PLPHPError
from plphp.families.registry import family_of
from plphp.inputs.chat import Messages
from plphp.inputs.later_turn import TokenInputs, TurnInputs, first_turn, later_turn, token_inputs, with_answer
from plphp.inputs.prompt import media_inputs, on_device
from plphp.pruning.image_bytes import ImageBytes
from plphp.pruning.report import PruneReport

from .cache import PrunedCache
from .cache_argument import cache_in, passed
from .conversation.turns import feature_names


@dataclass(frozen=True)
class Said:
    """What has been said up to the end of an answer.

    Parameters
    ----------
    turns : int
        Answers.
    messages : int
        Messages of the chat, the newest answer included.
    tokens : dict
        Tokens of these messages, see `plphp.inputs.later_turn.TokenInputs`.
    leftover : str
        Text of the newest answer in none of the tokens: the answer was cut within a token.
    held : int
        Tokens that the cache has read.
    """

    turns: int = 0
    messages: int = 0
    tokens: TokenInputs = field(default_factory=dict)
    leftover: str = ""
    held: int = 0


class OngoingChat:
    """A chat with a cache, made by the session that is open on the model.

    A turn is prepared, generated, kept and settled. What fails or is given up in between is taken back, if the cache
    can be cut to where it was: a turn without images can, and images cannot be unread. Then the chat is over.

    Parameters
    ----------
    model : PreTrainedModel
        The model, with a session of `plphp.prune` or `plphp.apply`.
    processor : ProcessorMixin
        Its processor.

    Attributes
    ----------
    cache : PrunedCache or None
        The cache, from the first turn on.
    said : Said
        What was kept.
    over : bool
        Whether the chat takes no further turn.
    """

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.cache: PrunedCache | None = None
        self.said = Said()
        self.over = False
        self._model, self._processor = model, processor
        self._before = self.said
        ends = model.generation_config.eos_token_id
        self._ends = set([] if ends is None else torch.as_tensor(ends).flatten().tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of its cache, see `PrunedCache.nbytes`; 0 without one."""
        return 0 if self.cache is None else self.cache.nbytes

    @property
    def image_bytes(self) -> ImageBytes:
        """What its images take under a budget."""
        return ImageBytes() if self.cache is None else self.cache.image_bytes

    def report(self) -> PruneReport:
        """What its cache holds.

        Raises
        ------
        CacheStateError
            If nothing was read yet, or the chat is over.
        """
        return self._read_cache().report()

    def prepare(self, chat: Messages) -> TurnInputs:
        """Make the inputs of the next turn.

        Parameters
        ----------
        chat : sequence of mapping
            The whole chat, see `plphp.inputs.chat.normalized`. It must begin with the messages that were read and
            answered, which is not checked; their images need no source.

        Raises
        ------
        PLPHPError
            If the chat cannot be read, or cannot go on; the chat is as before.
        """
        if self.over:
            raise CacheStateError("This chat is over: begin a new one, which reads everything again.")
        if self.cache is None:
            return first_turn(self._processor, chat)
        said = self.said
        return later_turn(self._processor, chat, said.messages - 1, said.tokens, leftover=said.leftover)

    def generate(self, turn: TurnInputs, **options: Any) -> list[int]:
        """Read a turn, and write its answer; return the answer's tokens.

        Parameters
        ----------
        turn : TurnInputs
            From `prepare`.
        **options
            Arguments of the model's ``generate``; beams leave a chat that cannot go on.

        Raises
        ------
        PLPHPError
            If the model cannot read it; `take_back` it.
        """
        with torch.no_grad():
            output: Any = self._model.generate(
                **on_device(self._model, turn.whole), **passed(self.cache), **options, return_dict_in_generate=True
            )
        self.cache = cache_in(output)
        tokens: list[int] = output.sequences[0, turn.tokens :].tolist()
        return tokens

    def keep(self, messages: int, turn: TurnInputs, tokens: list[int], text: str | None = None) -> None:
        """Keep a turn with its answer.

        Parameters
        ----------
        messages : int
            Messages of the chat, this answer included.
        turn : TurnInputs
            The turn.
        tokens : list of int
            What `generate` returned.
        text : str, optional
            What the answer is cut to; default: all of its text.

        Raises
        ------
        UnsupportedFeatureError
            If it is cut and the cache cannot be; `take_back` it.
        """
        # The template writes the token that ends an answer.
        kept, leftover = tokens[:-1] if tokens and tokens[-1] in self._ends else tokens, ""
        if text is not None:
            kept, leftover = self._cut(kept, text)
        read = with_answer(token_inputs(turn.whole), kept)
        cache = self._read_cache()
        superfluous = cache.get_seq_length() - read["input_ids"].shape[1]
        if superfluous > 0:
            cache.crop(-superfluous)
        self.said = Said(self._before.turns + 1, messages, read, leftover, cache.get_seq_length())

    def forget(self, image: int) -> None:
        """Free all entries of an image, see `PrunedCache.forget`; raises as that does, and the chat is as before."""
        with self._alive() as cache:
            cache.forget(image)

    def restore(self, image: int, pictures: Sequence[Any] = ()) -> None:
        """Bring an image back that has faded or was forgotten, see `PrunedCache.restore`.

        Parameters
        ----------
        image : int
            Its number in ``cache.images``.
        pictures : sequence of PIL.Image.Image
            All images of its turn, in their order, as some processors make other features of an image that comes with
            others; it is recognised among them. Nothing where it waits in host memory.

        Raises
        ------
        PLPHPError
            If it cannot be brought back; the chat is as before, or where the cache cannot be, over.
        """
        with self._alive() as cache:
            names = feature_names(family_of(self._model.config))
            inputs = media_inputs(self._processor, pictures) if pictures else {}
            features = {name: value for name, value in inputs.items() if name in names}
            cache.restore(image, **on_device(self._model, features))

    @contextmanager
    def _alive(self) -> Iterator[PrunedCache]:
        """The cache between two turns; where an error has ended it, the chat is over."""
        cache = self._read_cache()
        try:
            yield cache
        except BaseException:
            self.take_back()
            raise

    def settle(self) -> None:
        """End a turn that was kept: it is not taken back any more."""
        self._before = self.said

    def take_back(self) -> None:
        """Return to where the chat was when a turn was settled last; where that cannot be, the chat is over."""
        self.said = self._before
        if self.cache is None or not self.said.turns:
            self.cache, self.over = None, True
            return
        try:
            superfluous = self.cache.get_seq_length() - self.said.held
            self.cache.check_alive()
            if superfluous > 0:
                self.cache.crop(-superfluous)
            self.over = superfluous < 0
        except (PLPHPError, RuntimeError, ValueError):  # layers with a window or a state raise transformers' errors
            self.over = True
        if self.over:
            self.cache = None

    def _read_cache(self) -> PrunedCache:
        if self.cache is None:
            raise CacheStateError("This chat has no cache: nothing was read of it, or it is over.")
        return self.cache

    def _cut(self, tokens: list[int], text: str) -> tuple[list[int], str]:
        """The longest beginning of an answer's tokens that stands in a text, and the rest of that text."""
        for count in range(len(tokens), 0, -1):
            begin = str(self._processor.decode(tokens[:count], skip_special_tokens=True))
            if text.startswith(begin):
                return tokens[:count], text[len(begin) :]
        return [], text
