# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, GLM-4.5V and GLM-4.6V: images and video frames share a placeholder id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import grid_features, image_ids, in_prompt_order, merged_grids
from .base import Family, Inputs, VisionSegment
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    images = merged_grids(config, inputs.get("image_grid_thw"))
    videos = merged_grids(config, inputs.get("video_grid_thw"), "video")
    if images and videos:
        return None  # both fill the same placeholder id: their order is in mm_token_type_ids only
    return in_prompt_order(inputs, {config.image_token_id: images or videos})


FAMILY = Family(
    name="glm4v",
    model_types=("glm4v", "glm4v_moe", "glm46v"),
    # video_token_id marks a video in the text and is never in input_ids: frames are written with image tokens
    vision_token_ids=image_ids,
    segments=_segments,
    features=grid_features(image_ids, image_ids, image_type=1, video_type=2),
    tower=VisionTower(
        "visual",
        "visual.blocks",
        {
            "visual.patch_embed": "empty",
            "visual.post_layernorm": "same",
            "visual.downsample": "average",
            "visual.merger": "mean",
        },
    ),
    notes="Positions are three-dimensional and offset by rope_deltas, which the model keeps between turns.",
)
