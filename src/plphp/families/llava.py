# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5 and the checkpoints that share its class: Mantis, Pixtral-12B, BakLLaVA; ViP-LLaVA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import image_ids, in_prompt_order, patch_grid, patch_size, sized_images
from .base import Family, Features, Inputs, VisionSegment
from .towers import VisionTower, class_token_of_clip

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CLS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "siglip2_vision_model": 0}
"""Tokens beside the patches, by model type of the vision tower."""


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values, tower = inputs.get("pixel_values"), config.vision_config.model_type
    if pixel_values is None:
        return in_prompt_order(inputs, {config.image_token_id: []})
    if tower == "pixtral":  # images keep their own size; a break token ends each row of patches
        images = sized_images(inputs.get("image_sizes"), patch_size(config))
        return in_prompt_order(inputs, {config.image_token_id: images})
    if tower not in _CLS_TOKENS:
        return None
    rows, columns = patch_grid(config, pixel_values)
    # ViP-LLaVA has no strategy in its config: it always drops the first token
    dropped = getattr(config, "vision_feature_select_strategy", "default") == "default"
    tokens = rows * columns + _CLS_TOKENS[tower] - dropped
    grid = (1, rows, columns) if tokens == rows * columns else None
    return in_prompt_order(inputs, {config.image_token_id: [VisionSegment(tokens, grid)] * len(pixel_values)})


_NOTES = "With a Pixtral tower the break and end tokens of an image count as text and are kept."
_FEATURES = (Features(image_ids, each=("image_sizes",)),)
_TOWER = VisionTower("vision_tower", "vision_tower", {"multi_modal_projector": "mean"}, class_token=class_token_of_clip)

FAMILIES = (
    Family("llava", ("llava",), image_ids, _segments, _NOTES, _FEATURES, _TOWER),
    Family("vipllava", ("vipllava",), image_ids, _segments, features=_FEATURES, tower=_TOWER),
)
