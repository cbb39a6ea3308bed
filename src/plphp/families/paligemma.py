# SPDX-License-Identifier: Apache-2.0
"""PaliGemma and PaliGemma 2: fixed-size images before a prompt that is read bidirectionally."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import in_prompt_order, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    patch_height, patch_width = square(config.vision_config.patch_size)
    images: list[VisionSegment] = []
    if pixel_values is not None:
        height, width = pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width
        images = [VisionSegment(height * width, (1, height, width))] * len(pixel_values)
    return in_prompt_order(inputs, {config.image_token_id: images})


FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    vision_token_ids=token_ids("image_token_id"),
    segments=_segments,
    features=(Features(token_ids("image_token_id")),),
    notes="The whole prompt is read bidirectionally. PaliGemma 2 soft-caps its attention and is refused.",
)
