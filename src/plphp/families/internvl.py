# SPDX-License-Identifier: Apache-2.0
"""InternVL (the class of transformers): square tiles with pixel shuffle; video frames are tiles too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import equal_tiles, image_ids
from .base import Family, Features
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _shuffled(config: PretrainedConfig, patches: int) -> int:
    return int(patches * config.downsample_ratio)


FAMILY = Family(
    name="internvl",
    model_types=("internvl",),
    vision_token_ids=image_ids,
    segments=equal_tiles(_shuffled),
    features=(Features(image_ids),),
    tower=VisionTower("vision_tower", "vision_tower", {"multi_modal_projector": "mean"}, class_token=lambda config: 0),
    notes="A segment is a tile; the processor does not tell tiles of one image and frames of a video apart.",
)
