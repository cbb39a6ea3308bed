# SPDX-License-Identifier: Apache-2.0
"""PaliGemma and PaliGemma 2: fixed-size images before a prompt that is read bidirectionally."""

from ._segments import equal_tiles, image_ids
from .base import Family, Features

FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    vision_token_ids=image_ids,
    segments=equal_tiles(),
    features=(Features(image_ids),),
    notes="The whole prompt is read bidirectionally. PaliGemma 2 soft-caps its attention and is refused.",
)
