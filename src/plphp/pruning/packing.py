# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a pass a decoder layer gets, where vision tokens have left before it.

Everything outside of the layers keeps the coordinates of the whole prompt: input ids, masks, positions, rotary tables,
the length of the cache. A layer gets the tokens that are still there, side by side: *packed*. Rows of the batch that
have fewer of them are filled up in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

Fill = TypeVar("Fill", bool, int, float)


@dataclass(frozen=True)
class Packing:
    """The tokens of a pass that a layer gets.

    Parameters
    ----------
    rows : Tensor
        int64 [batch, packed], on the CPU; which token of the pass each packed token is, -1 where a row is filled up.
    tokens : int
        Tokens of the pass.
    """

    rows: Tensor
    tokens: int

    @classmethod
    def of(cls, stay: Tensor) -> Packing:
        """Pack the tokens that stay.

        Parameters
        ----------
        stay : Tensor
            bool [batch, tokens]; at least one in each row.
        """
        stay = stay.cpu()
        packed = int(stay.sum(1).max())
        # Stable: what leaves goes to the front, what stays keeps its order behind it.
        order = stay.long().argsort(dim=1, stable=True)[:, stay.shape[1] - packed :]
        return cls(torch.where(stay.gather(1, order), order, -1), stay.shape[1])

    @property
    def packed(self) -> int:
        """Tokens that the layer gets in each row, filled up."""
        return self.rows.shape[1]

    @property
    def left(self) -> int:
        """How many fewer these are than the tokens of the pass."""
        return self.tokens - self.packed

    @cached_property
    def filled(self) -> bool:
        """Whether any row is filled up."""
        return bool((self.rows < 0).any())

    @cached_property
    def stay(self) -> Tensor:
        """bool [batch, tokens]; the tokens that the layer gets."""
        return self.place >= 0

    @cached_property
    def place(self) -> Tensor:
        """int64 [batch, tokens]; where each token of the pass stands among the packed ones, -1 where it has left."""
        place = torch.full((len(self.rows), self.tokens + 1), -1)
        index = torch.arange(self.packed).expand_as(self.rows)
        # What fills a row up goes to a column of its own.
        return place.scatter(1, self.rows.where(self.rows >= 0, self.tokens), index)[:, : self.tokens]

    def repeated(self, times: int) -> Packing:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        return Packing(self.rows.repeat_interleave(times, dim=0), self.tokens)

    def behind(self, begin: int) -> Tensor:
        """Where these tokens stand in a tail that holds ``begin`` entries before the pass, with all of those entries,
        int64 [batch, begin + packed]; -1 where a row is filled up."""
        earlier = torch.arange(begin).expand(len(self.rows), -1)
        return torch.cat([earlier, (self.rows + begin).where(self.rows >= 0, -1)], 1)

    def narrowed(self, stay: Tensor) -> Packing:
        """Pack those that stay of the packed tokens, bool [batch, packed]."""
        gone = torch.zeros(len(stay), self.tokens, dtype=torch.bool)
        return Packing.of(gone | self.spread(stay.cpu(), False))

    def within(self, before: Packing | None) -> Tensor:
        """Which of the tokens of an earlier layer each token is, int64 [batch, packed], -1 where a row is filled up."""
        if before is None:
            return self.rows
        return before.place.gather(1, self.rows.clamp(min=0)).where(self.rows >= 0, -1)

    def take(self, states: Tensor, axis: int = 1, fill: float | None = None) -> Tensor:
        """Pack what there is of every token of the pass.

        Parameters
        ----------
        states : Tensor
            One dimension is the batch or 1, the next, ``axis``, the tokens.
        axis : int
            The dimension of the tokens, from 1.
        fill : number, optional
            What stands where a row is filled up; default: whatever the first token has.
        """
        return gathered(states, self.rows, axis, fill)

    def spread(self, states: Tensor, fill: Fill) -> Tensor:
        """Put what there is of every packed token back to the places of the whole pass.

        Parameters
        ----------
        states : Tensor
            [batch, ..., packed]; the last dimension is the tokens.
        fill : bool or number
            What stands where a token has left.
        """
        place = self.place.to(states.device).view(len(self.rows), *[1] * (states.ndim - 2), self.tokens)
        place = place.expand(*states.shape[:-1], self.tokens)
        return states.gather(-1, place.clamp(min=0)).masked_fill(place < 0, fill)

    def spread_tokens(self, states: Tensor) -> Tensor:
        """The same for states [batch, packed, ...], 0 where a token has left."""
        place = self.place.to(states.device).view(len(self.rows), self.tokens, *[1] * (states.ndim - 2))
        spread = states.gather(1, place.clamp(min=0).expand(-1, -1, *states.shape[2:]))
        return spread.masked_fill(place < 0, 0)


def gathered(states: Tensor, rows: Tensor, axis: int = 1, fill: float | None = None, *, batch: int = -1) -> Tensor:
    """Gather tokens of each row of the batch.

    Parameters
    ----------
    states : Tensor
        Its dimension ``axis`` is the tokens; its dimension ``batch``, by default the one before, is the batch or 1.
    rows : Tensor
        int64 [batch, packed]; -1 where a row is filled up.
    axis : int
        The dimension of the tokens.
    fill : number, optional
        What stands where a row is filled up; default: whatever the first token has.
    batch : int
        The dimension of the batch.
    """
    batch = axis - 1 if batch < 0 else batch
    shape, view = list(states.shape), [1] * states.ndim
    shape[batch], view[batch], view[axis] = len(rows), len(rows), -1
    states, rows = states.expand(shape), rows.to(states.device).view(view)
    shape[axis] = rows.shape[axis]
    taken = states.gather(axis, rows.clamp(min=0).expand(shape))
    return taken if fill is None else taken.masked_fill(rows < 0, fill)
