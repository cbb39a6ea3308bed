# SPDX-License-Identifier: Apache-2.0
"""Aya Vision and Command A Vision: square tiles with pixel shuffle on the text model Cohere 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import equal_tiles, image_ids
from .base import Family, Features
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _shuffled(config: PretrainedConfig, patches: int) -> int:
    return patches // config.downsample_factor


_SEGMENTS = equal_tiles(_shuffled)
_NOTES = "A segment is a tile. Three of four layers have a sliding window and are never pruned."
_FEATURES = (Features(image_ids),)
_TOWER = VisionTower(
    "vision_tower",
    "vision_tower",
    {
        "multi_modal_projector.layernorm": "same",
        "multi_modal_projector.linear_1": "mean",
        "multi_modal_projector.act": "one",  # of the gate, by which the other half of the channels is multiplied
        "multi_modal_projector.linear_2": "mean",
    },
)

FAMILIES = (
    Family("aya-vision", ("aya_vision",), image_ids, _SEGMENTS, _NOTES, _FEATURES, _TOWER),
    Family("cohere2-vision", ("cohere2_vision",), image_ids, _SEGMENTS, _NOTES, _FEATURES, _TOWER),
)
