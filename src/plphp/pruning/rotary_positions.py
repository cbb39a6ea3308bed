# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of the tokens of a conversation, where they are a single number."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans


def rotary_positions(spans: VisionSpans, rope_delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rotary positions of all tokens, and of the first behind the prompt.

    Parameters
    ----------
    spans : VisionSpans
        Where the vision tokens are.
    rope_delta : Tensor, optional
        int64 [batch, 1]; what rotary positions are ahead of the number of tokens, in models with m-RoPE.

    Returns
    -------
    tuple of Tensor
        int64 [batch, seq] and [batch, 1]. -1 where a position is no single number, see
        `plphp.policy.states.LayerStates`; that of padding means nothing.
    """
    number = spans.valid.cumsum(1) - 1
    if rope_delta is None:
        return number, number[:, -1:] + 1
    delta, vision = rope_delta.to(number.device), spans.vision.long()
    behind_images = vision.flip(1).cumsum(1).flip(1) == 0
    ahead = (vision.cumsum(1) == 0) & (spans.start == 0)
    position = torch.where(behind_images, number + delta, torch.where(ahead, number, -1))
    return position, number[:, -1:] + 1 + delta
