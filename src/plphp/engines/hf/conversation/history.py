# SPDX-License-Identifier: Apache-2.0
"""What a cache has read, so that a later turn that does not go on from it is refused, with the token that differs.

A cache cannot be checked by its keys: other tokens give other keys, and the answer would merely be wrong. So the tokens
themselves are kept, on the CPU, with their padding and the fingerprints of their images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad

from plphp.errors import HistoryError

from .fingerprints import same_image
from .turns import SentImage

UNKNOWN = -1
"""Stands for a token whose id never passed through plphp: given to ``model(...)`` directly, or as an embedding."""
AROUND = 3
"""Tokens that a message shows before and after the one that differs."""
IN_ANSWER = (
    "Usual causes: the decoded answer was tokenized to other tokens than were generated, or the chat template leaves "
    "out a part of it, such as its reasoning."
)
IN_PROMPT = (
    "Usual causes: another system prompt or chat template, an edited or truncated history, an image of another size or "
    "at another place."
)
WHAT_TO_DO = (
    "Send the tokens that were read (`sequences` of the turn before) with the new ones behind them, or make a new "
    "cache and read the whole conversation."
)


class History:
    """Tokens, padding and images that a cache has read, as far as they are known; the unknown is not checked.

    Attributes
    ----------
    ids : Tensor
        int64 [rows, seq]; `UNKNOWN` where a token is not known.
    valid : Tensor
        bool [rows, seq]; False on padding.
    prompts : list of tuple of int
        Begin and end of each prompt; answers stand between them.
    images : list of SentImage
        The images whose features were sent.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Know nothing."""
        self.ids = torch.zeros(0, 0, dtype=torch.long)
        self.valid = torch.zeros(0, 0, dtype=torch.bool)
        self.prompts: list[tuple[int, int]] = []
        self.images: list[SentImage] = []

    def cut(self, length: int) -> None:
        """Forget what stands behind the first ``length`` tokens."""
        self.ids, self.valid = self.ids[:, :length], self.valid[:, :length]
        self.prompts = [prompt for prompt in self.prompts if prompt[0] < length]
        self.images = [image for image in self.images if image.last < length]

    def check_tokens(self, ids: Tensor | None, valid: Tensor, packed: int) -> None:
        """Compare a conversation with what was read of it.

        Parameters
        ----------
        ids : Tensor, optional
            int64 [batch, seq]; the whole conversation or its end.
        valid : Tensor
            bool [batch, seq]; padding mask of the whole conversation.
        packed : int
            Tokens of which the cache holds what was no padding when they were read, whatever a later mask says.

        Raises
        ------
        HistoryError
            If they differ.
        """
        times = self._times(len(valid))
        if times == 0:
            return
        # Only the tokens that both have: a conversation may be longer, or shorter, than what was read.
        known = min(self.ids.shape[1], valid.shape[1])
        now, before = valid.repeat_interleave(times, dim=0)[:, :known], self.valid[:, :known]
        changed = now & ~before
        # A tail is masked anew at every step; the packed entries of a token are read whatever a mask says.
        changed[:, :packed] |= (before & ~now)[:, :packed]
        if changed.any():
            self._refuse_padding(changed, now, times)
        if ids is None:
            return
        offset = valid.shape[1] - ids.shape[1]
        sent = pad(ids.cpu(), (offset, 0), value=UNKNOWN).repeat_interleave(times, dim=0)
        again, read = sent[:, :known], self.ids[:, :known]
        differs = (again != read) & (again != UNKNOWN) & (read != UNKNOWN) & now & before
        if differs.any():
            self._refuse_tokens(differs, sent, times)

    def check_images(self, sent: Iterable[SentImage], rows: int) -> None:
        """Compare the images of a conversation of so many rows with those that were read.

        Raises
        ------
        HistoryError
            If an image differs from the image that was read at the same tokens.
        """
        times = self._times(rows)
        for image in sent if times else ():
            for known in self.images:
                same_tokens = (known.row // times, known.first, known.last) == (image.row, image.first, image.last)
                if same_tokens and not same_image(known.marks, image.marks):
                    raise HistoryError(
                        f"Image {image.number} of {image.name} is not the one that this cache has read at tokens "
                        f"{image.first} to {image.last} of row {image.row}. Send the images of the conversation in the "
                        "order in which they were sent before, prepared by the same processor with the same settings "
                        "on the same device, or the features of the new images alone; or make a new cache and read "
                        "the whole conversation."
                    )

    def note_prompt(self, ids: Tensor | None, valid: Tensor, begin: int, sent: Iterable[SentImage]) -> None:
        """Note a prompt that the cache will read.

        Parameters
        ----------
        ids : Tensor, optional
            int64 [batch, seq]; the whole conversation or its end.
        valid : Tensor
            bool [batch, seq]; padding mask of the whole conversation.
        begin : int
            Tokens that the cache holds.
        sent : iterable of SentImage
            The images of ``ids``; images of earlier turns are known already and are passed over.
        """
        batch, length = valid.shape
        self.cut(begin)
        if begin == 0 or not self._times(batch):
            self.clear()
        # A turn that returned several sequences of each prompt leaves as many rows of each row of the conversation.
        times = self._times(batch) or 1
        ids = torch.full((batch, 0), UNKNOWN) if ids is None else ids.cpu()
        new = pad(ids, (length - ids.shape[1], 0), value=UNKNOWN).repeat_interleave(times, dim=0)
        before = self._padded(len(new), begin)
        self.ids = torch.cat([before, new[:, begin:]], dim=1)
        self.valid = valid.repeat_interleave(times, dim=0)
        self.prompts.append((begin, length))
        self.images += [
            replace(image, row=image.row * times + copy)
            for image in sent
            if image.first >= begin
            for copy in range(times)
        ]

    def note_answer(self, sequences: Tensor, length: int) -> None:
        """Note what ``generate`` returned: int64 [rows, seq]; the cache holds all but the last token."""
        offset = length + 1 - sequences.shape[1]
        times, rest = divmod(len(sequences), max(1, len(self.ids)))
        if offset < 0 or rest or not len(self.ids):
            return
        self.select(torch.arange(len(self.ids)).repeat_interleave(times))
        before = self._padded(len(sequences), offset)
        self.ids = torch.cat([before, sequences[:, :-1].cpu()], dim=1)
        self.valid = pad(self.valid, (0, length - self.valid.shape[1]), value=True)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        numbers = rows.tolist()
        self.ids, self.valid = self.ids[numbers], self.valid[numbers]
        self.images = [
            replace(image, row=row)
            for row, number in enumerate(numbers)
            for image in self.images
            if image.row == number
        ]

    def _times(self, batch: int) -> int:
        """How many rows were read of each row of a conversation; 0 where the rows do not fit."""
        times, rest = divmod(len(self.ids), batch)
        return 0 if rest else times

    def _padded(self, rows: int, length: int) -> Tensor:
        """The first ``length`` tokens, `UNKNOWN` where they are not known, int64 [rows, length]."""
        known = self.ids[:, :length] if len(self.ids) else torch.full((rows, 0), UNKNOWN)
        return pad(known, (0, length - known.shape[1]), value=UNKNOWN)

    def _refuse_padding(self, changed: Tensor, now: Tensor, times: int) -> NoReturn:
        row, position = changed.nonzero()[0].tolist()
        read, sent = (int((~mask[row]).cumprod(0).sum()) for mask in (self.valid, now))
        number = row // times
        raise HistoryError(
            f"Row {number} of the conversation begins with {sent} tokens of padding and was read with {read}: the "
            "cache cannot move what it holds. Leave the padding of the earlier turns as it is and pad the new part of "
            "each row on its left, with an attention_mask over the whole; or keep a cache for each conversation."
            if read != sent
            else f"Token {position} of row {number} {'is masked' if self.valid[row, position] else 'is not masked'} in "
            "the attention_mask, unlike when this cache read it: pass the mask of the earlier turns with the new part "
            "behind it."
        )

    def _refuse_tokens(self, differs: Tensor, sent: Tensor, times: int) -> NoReturn:
        row, position = differs.nonzero()[0].tolist()
        where, cause = self._turn_of(position)
        raise HistoryError(
            f"Row {row // times} of the conversation differs from what this cache has read at token {position}, "
            f"{where}: the cache has read {_around(self.ids[row], position)}, the conversation has "
            f"{_around(sent[row], position)}. {cause} {WHAT_TO_DO}"
        )

    def _turn_of(self, position: int) -> tuple[str, str]:
        """In which turn a token stands, in its prompt or its answer, and why it may differ there."""
        turn = sum(begin <= position for begin, _ in self.prompts)
        if turn and position < self.prompts[turn - 1][1]:
            return f"in the prompt of turn {turn}", IN_PROMPT
        return f"in the answer of turn {turn}", IN_ANSWER


def _around(ids: Tensor, position: int) -> str:
    """The tokens around a position, whose own token is marked with stars."""
    begin = max(0, position - AROUND)
    shown = [str(token) if token != UNKNOWN else "?" for token in ids[begin : position + AROUND + 1].tolist()]
    shown[position - begin] = f"*{shown[position - begin]}*"
    return f"[{', '.join(shown)}]"
