# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL: fixed-size images on a Llama text model."""

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


_IDS = token_ids("image_token_id")

FAMILY = Family("deepseek-vl", ("deepseek_vl",), _IDS, _segments, features=(Features(_IDS),))
