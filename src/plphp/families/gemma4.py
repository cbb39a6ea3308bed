# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: images and video frames of their own size, pooled; layers of two head dims, most of them sliding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._segments import grid_segment, image_and_video_ids, image_ids, in_prompt_order, video_ids
from .base import Family, Features, Inputs, Kind, VisionSegment
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _pooled(config: PretrainedConfig, positions: Any, kind: Kind) -> list[VisionSegment]:
    """Return the segments of patch positions (images, patches, 2), x before y."""
    if positions is None:
        return []
    kernel = config.vision_config.pooling_kernel_size
    patches = positions.flatten(0, -3)  # frames of videos may have an axis of their own
    corners = (patches.amax(dim=1) + 1).tolist()  # padding patches are at -1
    sizes = [(height, width) for width, height in corners if width and height]
    return [grid_segment(1, height // kernel, width // kernel, kind) for height, width in sizes]


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    images = _pooled(config, inputs.get("image_position_ids"), "image")
    frames = _pooled(config, inputs.get("video_position_ids"), "video")
    return in_prompt_order(inputs, {config.image_token_id: images, config.video_token_id: frames})


def _frames(inputs: Inputs) -> list[int]:
    """Entries of ``pixel_values_videos`` for each video: its frames, or 1 where videos have an axis of their own."""
    counts = inputs.get("num_frames_per_video")
    return [1] * len(inputs["pixel_values_videos"]) if counts is None else [int(count) for count in counts]


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4",),
    vision_token_ids=image_and_video_ids,
    segments=_segments,
    features=(
        Features(image_ids, each=("image_position_ids",)),
        Features(
            video_ids,
            ("pixel_values_videos", "video_position_ids"),
            ("num_frames_per_video",),
            _frames,
        ),
    ),
    tower=VisionTower(
        "vision_tower",
        "vision_tower.encoder",
        {
            "vision_tower.patch_embedder": "empty",
            "vision_tower.std_bias": "zero",
            "vision_tower.std_scale": "one",
            "embed_vision": "mean",
        },
    ),
    notes=(
        "Five of six layers have a sliding window and are never pruned. Checkpoints whose last layers share keys "
        "and values (num_kv_shared_layers > 0: E2B, E4B) are not supported. A frame of a video is a segment."
    ),
)
