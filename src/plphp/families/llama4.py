# SPDX-License-Identifier: Apache-2.0
"""Llama 4: square tiles with pixel shuffle; three of four layers attend within chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import in_prompt_order, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    vision = config.vision_config
    patch_height, patch_width = square(vision.patch_size)
    tiles: list[VisionSegment] = []
    if pixel_values is not None:
        height = int(pixel_values.shape[-2] // patch_height * vision.pixel_shuffle_ratio)
        width = int(pixel_values.shape[-1] // patch_width * vision.pixel_shuffle_ratio)
        tiles = [VisionSegment(height * width, (1, height, width))] * len(pixel_values)
    return in_prompt_order(inputs, {config.image_token_id: tiles})


FAMILY = Family(
    name="llama4",
    model_types=("llama4",),
    vision_token_ids=token_ids("image_token_id"),
    segments=_segments,
    features=(Features(token_ids("image_token_id")),),
    notes="A segment is a tile. Layers with chunked attention are never pruned. transformers 5.24.0 fails in every "
    "pass.",
)
