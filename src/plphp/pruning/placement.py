# SPDX-License-Identifier: Apache-2.0
"""What becomes of an entry of the KV cache: whole, in few bits, or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from plphp.errors import UnsupportedFeatureError
from plphp.policy.allocation import RowAllocation
from plphp.policy.evidence import LayerScores


class Placement(IntEnum):
    """What becomes of the key and value of one token in one KV head.

    A placement of a layer is a uint8 tensor [batch, kv_heads, seq] of these numbers.
    """

    DROPPED = 0
    """Not held: no later step can read it."""
    FEW_BITS = 1
    """Held as a code of few bits. No method asks for it and no layer holds it yet."""
    WHOLE = 2
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
    """

    scores: LayerScores
    allocation: list[RowAllocation]
    placement: Tensor
    final: bool = True


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


def held_whole(placement: Tensor) -> Tensor:
    """Which entries are held in the dtype of the model, bool [batch, kv_heads, seq].

    Raises
    ------
    UnsupportedFeatureError
        If an entry is to be held in few bits.
    """
    if bool((placement == Placement.FEW_BITS).any()):
        raise UnsupportedFeatureError("No layer holds entries in few bits yet: place them whole, or drop them.")
    return placement == Placement.WHOLE
