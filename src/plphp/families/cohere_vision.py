# SPDX-License-Identifier: Apache-2.0
"""Aya Vision and Command A Vision: square tiles with pixel shuffle on the text model Cohere 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import in_prompt_order, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    patch_height, patch_width = square(config.vision_config.patch_size)
    tiles: list[VisionSegment] = []
    if pixel_values is not None:
        height = pixel_values.shape[-2] // patch_height // config.downsample_factor
        width = pixel_values.shape[-1] // patch_width // config.downsample_factor
        tiles = [VisionSegment(height * width, (1, height, width))] * len(pixel_values)
    return in_prompt_order(inputs, {config.image_token_id: tiles})


_NOTES = "A segment is a tile. Three of four layers have a sliding window and are never pruned."

_IDS = token_ids("image_token_id")
_FEATURES = (Features(_IDS),)

FAMILIES = (
    Family("aya-vision", ("aya_vision",), _IDS, _segments, _NOTES, _FEATURES),
    Family("cohere2-vision", ("cohere2_vision",), _IDS, _segments, _NOTES, _FEATURES),
)
