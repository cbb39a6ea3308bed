# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL: fixed-size images on a Llama text model."""

from ._segments import equal_tiles, image_ids
from .base import Family, Features
from .towers import VisionTower

FAMILY = Family(
    "deepseek-vl",
    ("deepseek_vl",),
    image_ids,
    equal_tiles(),
    features=(Features(image_ids),),
    tower=VisionTower("vision_model", "vision_model", {"aligner": "mean"}),
)
