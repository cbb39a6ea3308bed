# SPDX-License-Identifier: Apache-2.0
"""Mistral Small 3.1 and LightOnOCR: Pixtral tower with patch merging; images keep their own size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import image_ids, in_prompt_order, patch_size, sized_images
from .base import Family, Features, Inputs, VisionSegment
from .towers import StandIn, VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    height, width = patch_size(config)
    merged = height * config.spatial_merge_size, width * config.spatial_merge_size
    return in_prompt_order(inputs, {config.image_token_id: sized_images(inputs.get("image_sizes"), merged)})


_FEATURES = (Features(image_ids, each=("image_sizes",)),)


def _tower(module: str, projector: str) -> VisionTower:
    stand_ins: dict[str, StandIn] = {
        f"{projector}.norm": "same",
        f"{projector}.patch_merger.merging_layer": "mean",
        f"{projector}.linear_1": "mean",
        f"{projector}.act": "same",
        f"{projector}.linear_2": "mean",
    }
    return VisionTower(module, module, stand_ins)


FAMILIES = (
    Family(
        name="mistral3",
        model_types=("mistral3",),
        vision_token_ids=image_ids,
        segments=_segments,
        features=_FEATURES,
        tower=_tower("vision_tower", "multi_modal_projector"),
        notes="The break and end tokens of an image count as text and are kept.",
    ),
    Family(
        "lighton-ocr",
        ("lighton_ocr",),
        image_ids,
        _segments,
        features=_FEATURES,
        tower=_tower("vision_encoder", "vision_projection"),
    ),
)
