# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4.5: images and videos as grids of merged patches on a text model with sliding layers."""

from ._segments import grid_features, grids_of_images_and_videos, image_and_video_ids
from .base import Family
from .towers import MERGED_BLOCKS, VisionTower, full_attention_blocks

FAMILY = Family(
    name="exaone4.5",
    model_types=("exaone4_5",),
    vision_token_ids=image_and_video_ids,
    segments=grids_of_images_and_videos,
    features=grid_features(),
    tower=VisionTower("visual", "visual.blocks", MERGED_BLOCKS, full_attention=full_attention_blocks),
    notes="Three of four layers have a sliding window and are never pruned.",
)
