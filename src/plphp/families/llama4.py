# SPDX-License-Identifier: Apache-2.0
"""Llama 4: square tiles with pixel shuffle; three of four layers attend within chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import equal_tiles, image_ids
from .base import Family, Features
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _shuffled(config: PretrainedConfig, patches: int) -> int:
    return int(patches * config.vision_config.pixel_shuffle_ratio)


FAMILY = Family(
    name="llama4",
    model_types=("llama4",),
    vision_token_ids=image_ids,
    segments=equal_tiles(_shuffled),
    features=(Features(image_ids),),
    tower=VisionTower(
        "vision_model",
        "vision_model.model",
        {"vision_model.layernorm_post": "same", "vision_model.vision_adapter.mlp": "mean"},
        tokens="vision_model.vision_adapter.mlp",
        class_token=lambda config: -1,
    ),
    notes="A segment is a tile. Layers with chunked attention are never pruned. transformers 5.24.0 fails in every "
    "pass.",
)
