# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a conversation the entries of a layer's tail are of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import Fill, Packing


@dataclass(frozen=True)
class TailTokens:
    """The tokens that the entries of a tail are of: all of them, one by one, but for those that left before the layer.

    Parameters
    ----------
    begin : int
        Logical position of the first.
    dense : int
        Tokens from there on that all have their entries.
    packing : Packing, optional
        Of the tokens behind them, those that have entries.
    """

    begin: int
    dense: int
    packing: Packing | None = None

    @property
    def end(self) -> int:
        """Logical position behind the last token."""
        return self.begin + self.dense + (0 if self.packing is None else self.packing.tokens)

    def of(self, values: Tensor, fill: bool | int) -> Tensor:
        """What there is of the tail's entries.

        Parameters
        ----------
        values : Tensor
            [batch, seq]; of every token of the conversation.
        fill : bool or int
            What stands where a row is filled up.

        Returns
        -------
        Tensor
            [batch, tail].
        """
        dense = self.begin + self.dense
        if self.packing is None:
            return values[:, self.begin : dense]
        return torch.cat([values[:, self.begin : dense], self.packing.take(values[:, dense : self.end], fill=fill)], 1)

    def place(self, position: Tensor) -> Tensor:
        """Where tokens stand in the tail.

        Parameters
        ----------
        position : Tensor
            int64 [batch, n], on the CPU; logical positions up to the end of the tail.

        Returns
        -------
        Tensor
            int64 [batch, n]; negative where a token stands before the tail or has left before the layer.
        """
        place = position - self.begin
        if self.packing is None:
            return place
        later = place - self.dense
        packed = self.packing.place.gather(1, later.clamp(min=0))
        return torch.where(later < 0, place, torch.where(packed < 0, -1, packed + self.dense))

    def spread(self, values: Tensor, fill: Fill) -> Tensor:
        """Put what there is of the entries back to the places of all tokens of the tail.

        Parameters
        ----------
        values : Tensor
            [batch, kv_heads, tail].
        fill : bool or number
            What stands where a token has left.

        Returns
        -------
        Tensor
            [batch, kv_heads, tokens of the tail].
        """
        if self.packing is None:
            return values
        dense, packed = values[..., : self.dense], values[..., self.dense :]
        return torch.cat([dense, self.packing.spread(packed, fill)], -1)
