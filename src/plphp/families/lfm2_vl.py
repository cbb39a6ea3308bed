# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL: images and tiles of their own size; short convolutions between the attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import image_ids, in_prompt_order, sized_images
from .base import Family, Features, Inputs, VisionSegment
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    step = config.downsample_factor, config.downsample_factor
    return in_prompt_order(inputs, {config.image_token_id: sized_images(inputs.get("spatial_shapes"), step)})


FAMILY = Family(
    name="lfm2-vl",
    model_types=("lfm2_vl",),
    vision_token_ids=image_ids,
    segments=_segments,
    features=(Features(image_ids, each=("spatial_shapes", "pixel_attention_mask")),),
    tower=VisionTower(
        "vision_tower",
        "vision_tower",
        {
            "multi_modal_projector.layer_norm": "same",
            "multi_modal_projector.linear_1": "mean",
            "multi_modal_projector.act": "same",
            "multi_modal_projector.linear_2": "mean",
        },
    ),
    notes="A segment is a tile. Only the attention layers have a KV cache; the convolutions are not touched.",
)
