# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5 and the checkpoints that share its class: Mantis, Pixtral-12B, BakLLaVA; ViP-LLaVA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import in_prompt_order, rows_of, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CLS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "siglip2_vision_model": 0}
"""Tokens beside the patches, by model type of the vision tower."""


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    if pixel_values is None:
        return in_prompt_order(inputs, {config.image_token_id: []})
    vision = config.vision_config
    patch_height, patch_width = square(vision.patch_size)
    if vision.model_type == "pixtral":  # images keep their own size; a break token ends each row of patches
        sizes = [(h // patch_height, w // patch_width) for h, w in rows_of(inputs.get("image_sizes"))]
        images = [VisionSegment(h * w, (1, h, w)) for h, w in sizes]
        return in_prompt_order(inputs, {config.image_token_id: images})
    if vision.model_type not in _CLS_TOKENS:
        return None
    height, width = pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width
    # ViP-LLaVA has no strategy in its config: it always drops the first token
    dropped = getattr(config, "vision_feature_select_strategy", "default") == "default"
    tokens = height * width + _CLS_TOKENS[vision.model_type] - dropped
    grid = (1, height, width) if tokens == height * width else None
    return in_prompt_order(inputs, {config.image_token_id: [VisionSegment(tokens, grid)] * len(pixel_values)})


_FEATURES = (Features(token_ids("image_token_id"), each=("image_sizes",)),)

FAMILIES = (
    Family(
        name="llava",
        model_types=("llava",),
        vision_token_ids=token_ids("image_token_id"),
        segments=_segments,
        features=_FEATURES,
        notes="With a Pixtral tower the break and end tokens of an image count as text and are kept.",
    ),
    Family(
        name="vipllava",
        model_types=("vipllava",),
        vision_token_ids=token_ids("image_token_id"),
        segments=_segments,
        features=_FEATURES,
    ),
)
