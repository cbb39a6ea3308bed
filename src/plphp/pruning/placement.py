# SPDX-License-Identifier: Apache-2.0
"""What becomes of an entry of the KV cache: whole, in few bits, or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from plphp.errors import CacheStateError
from plphp.kernels.coder import Coder
from plphp.policy.allocation import RowAllocation
from plphp.policy.evidence import LayerScores
from plphp.settings.ladder import WHOLE


class Placement(IntEnum):
    """What becomes of the key and value of one token in one KV head.

    A placement of a layer is a uint8 tensor [batch, kv_heads, seq] of these numbers. Those between them say that the
    entry is held in few bits, in the rung of that number of the layer's `plphp.kernels.coded.Coder`, from 1.
    """

    DROPPED = 0
    """Not held: no later step can read it."""
    WHOLE = 255
    """Held in the dtype of the model."""


@dataclass(frozen=True)
class LayerPlacement:
    """What becomes of the entries of one layer.

    Parameters
    ----------
    scores : LayerScores
        What the layer's attention says of them; names the layer.
    allocation : list of RowAllocation
        Per row, what was decided at the layer level; its rate is of all vision tokens of the prompt.
    placement : Tensor
        uint8 [batch, kv_heads, seq], see `Placement`; of the entries of the layer's tail.
    final : bool
        False where the rates wait for later layers: what is dropped is not needed by any of them, ``allocation`` has
        the most that they can be, and another placement of the same tail narrows it.
    coder : Coder, optional
        Holds entries in few bits; needed where the placement asks for it.
    score : Tensor, optional
        float [batch, kv_heads, seq]; by which the entries fade later, under a budget.
    """

    scores: LayerScores
    allocation: list[RowAllocation]
    placement: Tensor
    final: bool = True
    coder: Coder | None = None
    score: Tensor | None = None


def whole_or_dropped(keep: Tensor) -> Tensor:
    """The placement of what is either kept whole or dropped.

    Parameters
    ----------
    keep : Tensor
        bool [batch, kv_heads, seq].

    Returns
    -------
    Tensor
        uint8 [batch, kv_heads, seq].
    """
    return keep.to(torch.uint8) * Placement.WHOLE


def by_rungs(names: Sequence[str], masks: Sequence[Tensor], scores: LayerScores, whole_rows: Sequence[int]) -> Tensor:
    """The placement of what is held in several rungs.

    Parameters
    ----------
    names : sequence of str
        The rungs, the best first.
    masks : sequence of Tensor
        For each rung, bool [batch, kv_heads, seq]: what is held in it or in a better one, and all that is no candidate.
    scores : LayerScores
        Gives the candidates.
    whole_rows : sequence of int
        Rows that are not pruned.

    Returns
    -------
    Tensor
        uint8 [batch, kv_heads, seq].
    """
    numbers = iter(range(1, Placement.WHOLE))
    values = [Placement.WHOLE if name == WHOLE else next(numbers) for name in names]
    placement = torch.zeros_like(masks[0], dtype=torch.uint8)
    for value, mask in reversed(list(zip(values, masks, strict=True))):
        placement.masked_fill_(mask, value)
    placement.masked_fill_(masks[0] & ~scores.candidates[:, None], Placement.WHOLE)
    placement[list(whole_rows)] = whole_or_dropped(masks[-1][list(whole_rows)])
    return placement


def without_codes(placement: Tensor) -> Tensor:
    """A placement of which what is held in few bits is dropped: that is held elsewhere."""
    return torch.where(placement == Placement.WHOLE, placement, Placement.DROPPED)


def coded_somewhere(placement: Tensor) -> bool:
    """Whether an entry is to be held in few bits."""
    return bool(in_few_bits(placement).any())


def in_few_bits(placement: Tensor) -> Tensor:
    """Which entries are to be held in few bits, bool [batch, kv_heads, seq]."""
    return (placement != Placement.DROPPED) & (placement != Placement.WHOLE)


def held_whole(placement: Tensor) -> Tensor:
    """Which entries are held in the dtype of the model, bool [batch, kv_heads, seq].

    Raises
    ------
    CacheStateError
        If an entry is to be held in few bits.
    """
    if coded_somewhere(placement):
        raise CacheStateError("A placement asks for few bits, and no coder came with it.")
    return placement == Placement.WHOLE
