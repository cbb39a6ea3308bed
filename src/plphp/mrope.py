# SPDX-License-Identifier: Apache-2.0
"""Multimodal rotary positions over several turns.

Models with m-RoPE place the tokens of an image in frame, row and column, so that positions run behind the number of
tokens by ``rope_deltas``. Transformers keeps that number on the model, where the next prompt of anybody overwrites it,
and cannot place a new image in a later turn: 5.17 gives it wrong positions, 5.23 stops. Here the number belongs to the
cache, and positions of a later turn are counted on from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import UnsupportedFeatureError


class TurnPositions:
    """Positions of one ``generate`` of a model with m-RoPE; does nothing for other models.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    deltas : Tensor, optional
        int64 [batch, 1]; what the cache kept of the turn before.
    """

    def __init__(self, model: PreTrainedModel, deltas: Tensor | None) -> None:
        holders = (model, getattr(model, "model", None))
        self._holder: Any = next((holder for holder in holders if hasattr(holder, "rope_deltas")), None)
        # A first turn given to the model itself, without generate, has left them there.
        self._before = deltas if deltas is not None else getattr(self._holder, "rope_deltas", None)
        self._after: Tensor | None = None

    def begin(self, inputs: dict[str, Any], past_length: int, has_new_vision: bool) -> dict[str, Any]:
        """Put the deltas on the model, and return the arguments that ``generate`` needs beside the inputs.

        Parameters
        ----------
        inputs : dict
            Of ``generate``.
        past_length : int
            Tokens that the cache holds.
        has_new_vision : bool
            Whether there are vision tokens among the new ones.

        Raises
        ------
        UnsupportedFeatureError
            If the positions of a new image cannot be told.
        """
        if self._before is None or past_length == 0:
            return {}
        self._holder.rope_deltas = self._before
        positions = inputs.get("position_ids")
        if positions is None and not has_new_vision:
            return {}
        mask = inputs["attention_mask"]
        if positions is None:
            positions = self._count_on(inputs, mask, past_length, self._before)
        end = positions[-3:, :, -1].amax(0)[:, None] + 1
        self._after = end - mask.sum(1, keepdim=True)
        return {"position_ids": positions}

    def _count_on(self, inputs: dict[str, Any], mask: Tensor, past_length: int, deltas: Tensor) -> Tensor:
        """Positions [4, batch, seq] of the whole conversation; those of earlier turns are not read any more."""
        types = inputs.get("mm_token_type_ids")
        if types is None:
            raise UnsupportedFeatureError(
                "A new image in a later turn of a model with m-RoPE needs mm_token_type_ids, which the processor "
                "returns, or position_ids for the whole conversation."
            )
        new = mask.shape[1] - past_length
        positions, _ = self._holder.get_rope_index(
            inputs["input_ids"][:, -new:],
            types[:, -new:],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            attention_mask=mask[:, -new:],
        )
        offset = mask[:, :past_length].sum(1, keepdim=True) + deltas.to(mask.device)
        earlier = positions.new_zeros(3, len(mask), past_length)
        text = (mask.cumsum(1) - 1).clamp(min=0)
        return torch.cat([text[None], torch.cat([earlier, positions + offset], dim=2)])

    def end(self) -> Tensor | None:
        """Return what the cache has to keep for the next turn."""
        if self._holder is None:
            return None
        if self._after is not None:
            self._holder.rope_deltas = self._after
        deltas: Tensor | None = self._holder.rope_deltas
        return deltas
