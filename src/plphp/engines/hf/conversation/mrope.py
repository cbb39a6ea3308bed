# SPDX-License-Identifier: Apache-2.0
"""Multimodal rotary positions over several turns.

Models with m-RoPE place the tokens of an image in frame, row and column, so that positions run behind the number of
tokens by ``rope_deltas``. Transformers keeps that number on the model, where the next prompt of any caller overwrites
it, and cannot place a new image in a later turn: 5.17 gives it wrong positions, 5.23 stops. Here it is worked out from
the inputs of every turn and belongs to the cache.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plphp.errors import UnsupportedFeatureError
from plphp.families.base import Inputs

POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
"""Inputs of images and videos that positions depend on, where the model knows them."""


@dataclass(frozen=True)
class TurnPositions:
    """Positions of one turn of a model with m-RoPE.

    Parameters
    ----------
    start : int
        Tokens of the earlier turns.
    before, after : Tensor
        int64 [batch, 1]; ``rope_deltas`` before and after the turn.
    positions : Tensor, optional
        int64 [4, batch, seq]; text, frame, row and column of the whole conversation. Frames, rows and columns of
        earlier turns are not read any more, and 0. None in the first turn, which transformers places by itself.
    placed : Tensor, optional
        int64 [3, batch, new]; frame, row and column of the new tokens.
    """

    start: int
    before: Tensor | None
    after: Tensor
    positions: Tensor | None
    placed: Tensor | None = None


def turn_positions(
    model: PreTrainedModel, inputs: Inputs, valid: Tensor, start: int, before: Tensor | None, has_vision: bool
) -> TurnPositions | None:
    """Place the tokens of a turn.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    inputs : mapping
        Inputs of ``generate``, with ``mm_token_type_ids`` and the grids where the turn has vision tokens.
    valid : Tensor
        bool [batch, seq]; padding mask of the whole conversation.
    start : int
        Tokens that the cache holds.
    before : Tensor, optional
        int64 [batch, 1]; ``rope_deltas`` of the turn before.
    has_vision : bool
        Whether there are vision tokens among the new ones.

    Returns
    -------
    TurnPositions or None
        None for a model without m-RoPE.

    Raises
    ------
    UnsupportedFeatureError
        If the inputs say too little to place an image.
    """
    holder = position_holder(model)
    if holder is None or (start and before is None):
        return None
    if start == 0 and has_vision and (inputs.get("input_ids") is None or inputs.get("mm_token_type_ids") is None):
        return None  # transformers refuses such a prompt, or places embeddings as text
    mask = valid.to(model.device).long()
    if before is not None and len(before) != len(mask):
        # The turn before returned several sequences of each prompt.
        before = before.repeat_interleave(len(mask) // len(before), dim=0)
    offset = mask[:, :start].sum(1, keepdim=True) + (0 if before is None else before.to(mask.device))
    of_caller = inputs.get("position_ids")
    if of_caller is not None:
        new = of_caller[-3:, :, start - of_caller.shape[2] :] if start else of_caller[-3:]
    elif has_vision:
        new = _placed(holder, inputs, mask[:, start:]) + offset
    else:
        new = ((mask[:, start:].cumsum(1) - 1).clamp(min=0) + offset).expand(3, -1, -1)
    after = new.amax((0, 2))[:, None] + 1 - mask.sum(1, keepdim=True)
    if start == 0:
        return TurnPositions(start, before, after, None, new)
    text = (mask.cumsum(1) - 1).clamp(min=0)
    positions = torch.cat([text[None], torch.cat([new.new_zeros(3, len(mask), start), new], dim=2)])
    return TurnPositions(start, before, after, positions, new)


def position_holder(model: PreTrainedModel) -> Any:
    """The module that keeps ``rope_deltas``, or None for a model without m-RoPE."""
    holders = (model, getattr(model, "model", None))
    return next((part for part in holders if hasattr(part, "rope_deltas") and hasattr(part, "get_rope_index")), None)


def _placed(holder: Any, inputs: Inputs, mask: Tensor) -> Tensor:
    """Positions [3, batch, new] of the new tokens by the model's own rule, as if the turn began at 0."""
    ids, types = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
    if ids is None or types is None:
        raise UnsupportedFeatureError(
            "A prompt with images of a model with m-RoPE needs input_ids and mm_token_type_ids, which the processor "
            "returns, or position_ids."
        )
    new = mask.shape[1]
    names = inspect.signature(holder.get_rope_index).parameters
    grids = {name: inputs[name] for name in names if name in POSITION_INPUTS and inputs.get(name) is not None}
    positions, _ = holder.get_rope_index(ids[:, -new:], types[:, -new:], **grids, attention_mask=mask)
    return positions
