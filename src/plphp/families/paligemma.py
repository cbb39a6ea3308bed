# SPDX-License-Identifier: Apache-2.0
"""PaliGemma and PaliGemma 2: fixed-size images before a prompt that is read bidirectionally."""

from ._segments import equal_tiles, image_ids
from .base import Family, Features
from .towers import VisionTower

FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    vision_token_ids=image_ids,
    segments=equal_tiles(),
    features=(Features(image_ids),),
    tower=VisionTower("vision_tower", "vision_tower", {"multi_modal_projector": "mean"}),
    notes="The whole prompt is read bidirectionally. PaliGemma 2 soft-caps its attention and is refused.",
)
