# SPDX-License-Identifier: Apache-2.0
"""Ovis2: tiles of visual words, with indicator tokens between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._segments import equal_tiles, image_ids
from .base import Family, Features
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _words(config: PretrainedConfig, patches: int) -> int:
    return math.ceil(patches / config.vision_config.hidden_stride)


FAMILY = Family(
    name="ovis2",
    model_types=("ovis2",),
    vision_token_ids=image_ids,
    segments=equal_tiles(_words),
    features=(Features(image_ids),),
    tower=VisionTower(
        "vision_tower",
        "vision_tower.transformer",
        {"vision_tower.head_linear": "mean"},
        tokens="vision_tower.head_linear",  # then a softmax over visual words, in which the scores would be lost
    ),
    notes="A segment is a tile; the indicator tokens around tiles count as text and are kept.",
)
