# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL: images and tiles of their own size; short convolutions between the attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import in_prompt_order, rows_of, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    factor = config.downsample_factor
    sizes = [(rows // factor, columns // factor) for rows, columns in rows_of(inputs.get("spatial_shapes"))]
    images = [VisionSegment(rows * columns, (1, rows, columns)) for rows, columns in sizes]
    return in_prompt_order(inputs, {config.image_token_id: images})


FAMILY = Family(
    name="lfm2-vl",
    model_types=("lfm2_vl",),
    vision_token_ids=token_ids("image_token_id"),
    segments=_segments,
    features=(Features(token_ids("image_token_id"), each=("spatial_shapes", "pixel_attention_mask")),),
    notes="A segment is a tile. Only the attention layers have a KV cache; the convolutions are not touched.",
)
