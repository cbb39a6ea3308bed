# SPDX-License-Identifier: Apache-2.0
"""Mistral Small 3.1 and LightOnOCR: Pixtral tower with patch merging; images keep their own size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import in_prompt_order, rows_of, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    patch_height, patch_width = square(config.vision_config.patch_size)
    merge = config.spatial_merge_size
    sizes = [
        (height // (patch_height * merge), width // (patch_width * merge))
        for height, width in rows_of(inputs.get("image_sizes"))
    ]
    images = [VisionSegment(height * width, (1, height, width)) for height, width in sizes]
    return in_prompt_order(inputs, {config.image_token_id: images})


_FEATURES = (Features(token_ids("image_token_id"), each=("image_sizes",)),)

FAMILIES = (
    Family(
        name="mistral3",
        model_types=("mistral3",),
        vision_token_ids=token_ids("image_token_id"),
        segments=_segments,
        features=_FEATURES,
        notes="The break and end tokens of an image count as text and are kept.",
    ),
    Family("lighton-ocr", ("lighton_ocr",), token_ids("image_token_id"), _segments, features=_FEATURES),
)
