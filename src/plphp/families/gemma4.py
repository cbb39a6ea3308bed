# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: images and video frames of their own size, pooled; layers of two head dims, most of them sliding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plphp.errors import UnsupportedModelError

from ._segments import in_prompt_order, token_ids
from .base import Family, Features, Inputs, VisionSegment
from .unsupported import reason_against

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _pooled(positions: Any, kernel: int) -> list[tuple[int, int]]:
    """Return rows and columns of pooled tokens from patch positions (images, patches, 2), x before y."""
    if positions is None:
        return []
    patches = positions.flatten(0, -3)  # frames of videos may have an axis of their own
    corners = (patches.amax(dim=1) + 1).tolist()  # padding patches are at -1
    return [(height // kernel, width // kernel) for width, height in corners if width and height]


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    kernel = config.vision_config.pooling_kernel_size
    images = _pooled(inputs.get("image_position_ids"), kernel)
    frames = _pooled(inputs.get("video_position_ids"), kernel)
    return in_prompt_order(
        inputs,
        {
            config.image_token_id: [VisionSegment(h * w, (1, h, w)) for h, w in images],
            config.video_token_id: [VisionSegment(h * w, (1, h, w), "video") for h, w in frames],
        },
    )


def _frames(inputs: Inputs) -> list[int]:
    """Entries of ``pixel_values_videos`` for each video: its frames, or one where videos have an axis of their own."""
    counts = inputs.get("num_frames_per_video")
    return [1] * len(inputs["pixel_values_videos"]) if counts is None else [int(count) for count in counts]


def _vision_token_ids(config: PretrainedConfig) -> tuple[int, ...]:
    if reason := reason_against(config):
        raise UnsupportedModelError(f"plphp does not prune this {config.model_type!r} model: {reason}")
    return token_ids("image_token_id", "video_token_id")(config)


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4",),
    vision_token_ids=_vision_token_ids,
    segments=_segments,
    features=(
        Features(token_ids("image_token_id"), each=("image_position_ids",)),
        Features(
            token_ids("video_token_id"),
            ("pixel_values_videos", "video_position_ids"),
            ("num_frames_per_video",),
            _frames,
        ),
    ),
    notes=(
        "Five of six layers have a sliding window and are never pruned. Checkpoints whose last layers share keys "
        "and values (num_kv_shared_layers > 0: E2B, E4B) are not supported. A frame of a video is a segment."
    ),
)
