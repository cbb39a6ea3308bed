# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4.5: images and videos as grids of merged patches on a text model with sliding layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import grid_features, grid_segments, in_prompt_order, token_ids
from .base import Family, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    merge = config.vision_config.spatial_merge_size
    return in_prompt_order(
        inputs,
        {
            config.image_token_id: grid_segments(inputs.get("image_grid_thw"), merge),
            config.video_token_id: grid_segments(inputs.get("video_grid_thw"), merge, "video"),
        },
    )


FAMILY = Family(
    name="exaone4.5",
    model_types=("exaone4_5",),
    vision_token_ids=token_ids("image_token_id", "video_token_id"),
    segments=_segments,
    features=grid_features(token_ids("image_token_id"), token_ids("video_token_id")),
    notes="Three of four layers have a sliding window and are never pruned.",
)
