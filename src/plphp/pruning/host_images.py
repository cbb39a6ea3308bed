# SPDX-License-Identifier: Apache-2.0
"""Whole images in host memory, so that one that has faded comes back without being computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .entries import LayerEntries
from .image_table import TableImage
from .tail_tokens import TailTokens


@dataclass(frozen=True)
class WholeLayer:
    """Whole keys and values of vision tokens in one layer.

    Parameters
    ----------
    keys, values : Tensor
        [kv_heads, tokens, dim].
    position : Tensor
        int64 [tokens]; their logical positions, rising.
    """

    keys: Tensor
    values: Tensor
    position: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeLayer:
        return self  # nothing in it changes

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @classmethod
    def of_span(cls, states: tuple[Tensor, Tensor], first: int, position: Tensor) -> WholeLayer:
        """Those at some positions of keys and values [1, kv_heads, tokens, dim] of all tokens from ``first`` on."""
        place = (position - first).to(states[0].device)
        return cls(states[0][0, :, place], states[1][0, :, place], position)

    def among(self, position: Tensor) -> WholeLayer:
        """Those whose positions are among others, int64."""
        own = torch.isin(self.position, position)
        return WholeLayer(self.keys[:, own], self.values[:, own], self.position[own])


class HostImages:
    """The images of each row in host memory, prompt by prompt.

    Attributes
    ----------
    rows : list of dict
        By row, from layer and beginning of a prompt to what is held of it.
    """

    def __init__(self) -> None:
        self.rows: list[dict[tuple[int, int], WholeLayer]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all of it; what rows share counts once."""
        return sum({id(own): own.nbytes for row in self.rows for own in row.values()}.values())

    def note(self, number: int, layer: LayerEntries, tokens: TailTokens, vision: Tensor, prompt: int) -> None:
        """Copy the vision entries of a layer's tail, before it is placed.

        Parameters
        ----------
        number : int
            Decoder layer.
        layer : LayerEntries
            With the whole prompt in its tail.
        tokens : TailTokens
            Those of the tail.
        vision : Tensor
            bool [batch, tail].
        prompt : int
            Logical position at which the prompt begins.
        """
        keys, values = layer.tail()
        position = tokens.of(torch.arange(tokens.end).expand(len(vision), -1), -1)
        if not self.rows:
            self.rows = [{} for _ in range(len(vision))]
        for row, own in enumerate(vision.cpu()):
            if bool(own.any()):
                some = own.to(keys.device)
                own_keys, own_values = (states[row][:, some].detach().cpu() for states in (keys, values))
                self.rows[row][number, prompt] = WholeLayer(own_keys, own_values, position[row, own])

    def image(self, row: int, number: int, image: TableImage) -> WholeLayer | None:
        """An image of a row in a layer; None where all of its tokens had left before the layer."""
        of_prompt = self.rows[row].get((number, image.prompt))
        whole = None if of_prompt is None else of_prompt.among(image.positions)
        return whole if whole is not None and len(whole.position) else None

    def select(self, rows: Sequence[int]) -> None:
        """Take rows in a new order."""
        if self.rows:
            self.rows = [dict(self.rows[row]) for row in rows]
