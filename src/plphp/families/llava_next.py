# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (1.6) and LLaVA-NeXT-Video: tiles of any resolution, packed with newline tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ._segments import grid_segment, image_and_video_ids, image_ids, in_prompt_order, rows_of, video_ids
from .base import Family, Features, Inputs, VisionSegment
from .towers import VisionTower, class_token_of_clip

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def unpadded_grid(config: PretrainedConfig, size: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of the patches that the model keeps of an image's tiles, without the newline tokens.

    Parameters
    ----------
    config : PretrainedConfig
        Reads ``image_grid_pinpoints`` and the tower's ``image_size`` and ``patch_size``.
    size : tuple of int
        ``(height, width)`` of the original image in pixels.

    Returns
    -------
    tuple of int
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
    dropped = int(config.vision_feature_select_strategy == "default")
    return None if extra is None else int((vision.image_size // vision.patch_size) ** 2) + extra - dropped


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    base = base_tokens(config)
    if base is None:
        return None
    images = []
    for size in rows_of(inputs.get("image_sizes")):
        rows, columns = unpadded_grid(config, size)
        images.append(VisionSegment(base + rows * (columns + 1)))  # a newline token per row
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
        videos = [grid_segment(frames, side, side, "video")] * count
    return in_prompt_order(inputs, {config.image_token_id: images, config.video_token_id: videos})


_IMAGES = Features(image_ids, each=("image_sizes",))
_VIDEOS = Features(video_ids, ("pixel_values_videos",))
_NOTES = "The newline tokens between rows of patches are placeholders too and are evicted like patches."
_TOWER = VisionTower(
    "vision_tower",
    "vision_tower",
    {"multi_modal_projector": "mean", "image_newline": "zero", "vision_resampler.pool": "average"},
    class_token=class_token_of_clip,
)

FAMILIES = (
    Family("llava-next", ("llava_next",), image_ids, _segments, _NOTES, (_IMAGES,), _TOWER),
    Family(
        "llava-next-video",
        ("llava_next_video",),
        image_and_video_ids,
        _video_segments,
        _NOTES,
        (_IMAGES, _VIDEOS),
        _TOWER,
    ),
)
