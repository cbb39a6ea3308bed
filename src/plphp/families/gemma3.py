# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: a fixed number of tokens per image or crop, seen bidirectionally; most layers slide."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._segments import grid_segment, image_ids, in_prompt_order
from .base import Family, Features, Inputs, VisionSegment
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    side = math.isqrt(config.mm_tokens_per_image)
    count = 0 if pixel_values is None else len(pixel_values)
    return in_prompt_order(inputs, {config.image_token_id: [grid_segment(1, side, side)] * count})


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3",),
    vision_token_ids=image_ids,
    segments=_segments,
    features=(Features(image_ids),),
    tower=VisionTower(
        "vision_tower",
        "vision_tower",
        {
            "multi_modal_projector.mm_soft_emb_norm": "same",
            "multi_modal_projector.mm_input_projection_weight": "mean",
        },
    ),
    notes=(
        "Five of six layers have a sliding window and are never pruned. Tokens of an image see the whole "
        "image (token_type_ids), also what stands after them."
    ),
)
