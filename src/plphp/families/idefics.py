# SPDX-License-Identifier: Apache-2.0
"""Idefics2, Idefics3 and SmolVLM: a fixed number of tokens per tile; video frames are tiles too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.families._segments import in_prompt_order, real_images, square, token_ids
from plphp.families.base import Family, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _resampled(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    image = VisionSegment(config.perceiver_config.resampler_n_latents)  # latents have no place in the image
    return in_prompt_order(inputs, {config.image_token_id: [image] * real_images(inputs)})


def _shuffled(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    if pixel_values is None:
        return in_prompt_order(inputs, {config.image_token_id: []})
    patch_height, patch_width = square(config.vision_config.patch_size)
    height = pixel_values.shape[-2] // patch_height // config.scale_factor
    width = pixel_values.shape[-1] // patch_width // config.scale_factor
    tile = VisionSegment(height * width, (1, height, width))
    return in_prompt_order(inputs, {config.image_token_id: [tile] * real_images(inputs)})


FAMILIES = (
    Family(
        "idefics2",
        ("idefics2",),
        token_ids("image_token_id"),
        _resampled,
        notes="Refused where the Mistral text model has a sliding window, which all of its layers share.",
    ),
    Family(
        "idefics3",
        ("idefics3", "smolvlm"),
        token_ids("image_token_id"),
        _shuffled,
        "A segment is a tile; row, column and frame markers between tiles count as text and are kept.",
    ),
)
