# SPDX-License-Identifier: Apache-2.0
"""Ovis2: tiles of visual words, with indicator tokens between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._segments import in_prompt_order, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    patch_height, patch_width = square(config.vision_config.patch_size)
    stride = config.vision_config.hidden_stride
    tiles: list[VisionSegment] = []
    if pixel_values is not None:
        height = math.ceil(pixel_values.shape[-2] // patch_height / stride)
        width = math.ceil(pixel_values.shape[-1] // patch_width / stride)
        tiles = [VisionSegment(height * width, (1, height, width))] * len(pixel_values)
    return in_prompt_order(inputs, {config.image_token_id: tiles})


FAMILY = Family(
    name="ovis2",
    model_types=("ovis2",),
    vision_token_ids=token_ids("image_token_id"),
    segments=_segments,
    features=(Features(token_ids("image_token_id")),),
    notes="A segment is a tile; the indicator tokens around tiles count as text and are kept.",
)
