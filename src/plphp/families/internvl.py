# SPDX-License-Identifier: Apache-2.0
"""InternVL (the class of transformers): square tiles with pixel shuffle; video frames are tiles too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import in_prompt_order, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    if pixel_values is None:
        return in_prompt_order(inputs, {config.image_token_id: []})
    patch_height, patch_width = square(config.vision_config.patch_size)
    height = int(pixel_values.shape[-2] // patch_height * config.downsample_ratio)
    width = int(pixel_values.shape[-1] // patch_width * config.downsample_ratio)
    tile = VisionSegment(height * width, (1, height, width))
    return in_prompt_order(inputs, {config.image_token_id: [tile] * len(pixel_values)})


FAMILY = Family(
    name="internvl",
    model_types=("internvl",),
    vision_token_ids=token_ids("image_token_id"),
    segments=_segments,
    features=(Features(token_ids("image_token_id")),),
    notes="A segment is a tile; the processor does not tell tiles of one image and frames of a video apart.",
)
