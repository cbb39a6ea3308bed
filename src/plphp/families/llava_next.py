# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (1.6) and LLaVA-NeXT-Video: tiles of any resolution, packed with newline tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._segments import in_prompt_order, rows_of, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def unpadded_grid(config: PretrainedConfig, size: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of patches that stay of the tiles of an image, without the newline tokens.

    Parameters
    ----------
    config : PretrainedConfig
        Reads ``image_grid_pinpoints`` and the tower's ``image_size`` and ``patch_size``.
    size : tuple of int
        ``(height, width)`` of the original image in pixels.
    """
    from transformers.image_processing_utils import select_best_resolution

    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    best_height, best_width = select_best_resolution(size, config.image_grid_pinpoints)
    rows, columns = side * (best_height // vision.image_size), side * (best_width // vision.image_size)
    height, width = size
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - kept) // 2), columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - kept) // 2)


def base_tokens(config: PretrainedConfig) -> int | None:
    """Return the tokens of the tile that shows the whole image; None if the tower is unknown."""
    vision = config.vision_config
    extra = {"clip_vision_model": 1, "siglip_vision_model": 0}.get(vision.model_type)
    if extra is None:
        return None
    dropped = int(config.vision_feature_select_strategy == "default")
    return int((vision.image_size // vision.patch_size) ** 2) + extra - dropped


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    base = base_tokens(config)
    if base is None:
        return None
    images = []
    for size in rows_of(inputs.get("image_sizes")):
        rows, columns = unpadded_grid(config, size)
        images.append(VisionSegment(base + rows * (columns + 1)))  # one newline token per row
    return in_prompt_order(inputs, {config.image_token_id: images})


def _video_segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    images = _segments(config, inputs)
    if images is None:
        return None
    videos: list[VisionSegment] = []
    pixel_values = inputs.get("pixel_values_videos")
    if pixel_values is not None:
        count, frames = pixel_values.shape[:2]
        patches = config.vision_config.image_size // config.vision_config.patch_size
        side = math.floor(patches / config.spatial_pool_stride)
        videos = [VisionSegment(frames * side * side, (frames, side, side), "video")] * count
    return in_prompt_order(inputs, {config.image_token_id: images, config.video_token_id: videos})


IMAGE_FEATURES = (Features(token_ids("image_token_id"), each=("image_sizes",)),)

FAMILIES = (
    Family(
        name="llava-next",
        model_types=("llava_next",),
        vision_token_ids=token_ids("image_token_id"),
        segments=_segments,
        features=IMAGE_FEATURES,
        notes="The newline tokens between rows of patches are placeholders too and are evicted like patches.",
    ),
    Family(
        name="llava-next-video",
        model_types=("llava_next_video",),
        vision_token_ids=token_ids("image_token_id", "video_token_id"),
        segments=_video_segments,
        features=(*IMAGE_FEATURES, Features(token_ids("video_token_id"), ("pixel_values_videos",))),
        notes="The newline tokens between rows of patches are placeholders too and are evicted like patches.",
    ),
)
