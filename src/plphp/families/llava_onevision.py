# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: tiles for a single image, one tile each for several images, pooled frames for videos."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from plphp.families._segments import in_prompt_order, rows_of, token_ids
from plphp.families.base import Family, Inputs, VisionSegment
from plphp.families.llava_next import base_tokens, unpadded_grid

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _tiled(config: PretrainedConfig, size: tuple[int, ...], base: int) -> VisionSegment:
    """Count the tokens of an image that is alone in its row: whole image, tiles, one newline per row."""
    rows, columns = unpadded_grid(config, size)
    side = config.vision_config.image_size // config.vision_config.patch_size
    max_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (max_tiles * side**2))
    if ratio > 1.1:  # the model scales the tiles down
        rows, columns = int(rows // ratio), int(columns // ratio)
    return VisionSegment(base + rows * (columns + 1))


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    base = base_tokens(config)
    if base is None:
        return None
    sizes = rows_of(inputs.get("image_sizes"))
    per_row = inputs.get("batch_num_images")
    alone = [True] * len(sizes) if per_row is None else [int(n) == 1 for n in per_row for _ in range(int(n))]
    images = [
        _tiled(config, size, base) if single else VisionSegment(base + 1)  # + 1: newline
        for size, single in zip(sizes, alone, strict=True)
    ]
    videos: list[VisionSegment] = []
    pixel_values = inputs.get("pixel_values_videos")
    if pixel_values is not None:
        count, frames = pixel_values.shape[:2]
        side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
        videos = [VisionSegment(frames * side * side + 1, None, "video")] * count  # + 1: newline
    return in_prompt_order(inputs, {config.image_token_id: images, config.video_token_id: videos})


FAMILY = Family(
    name="llava-onevision",
    model_types=("llava_onevision",),
    vision_token_ids=token_ids("image_token_id", "video_token_id"),
    segments=_segments,
    notes="The newline tokens are placeholders too and are evicted like patches.",
)
