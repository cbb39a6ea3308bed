# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images and videos as grids of merged patches, with m-RoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._segments import grid_features, grid_segments, in_prompt_order, token_ids
from .base import Family, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_IDS = token_ids("image_token_id", "video_token_id")
_MROPE = "Positions are three-dimensional and offset by rope_deltas, which the model keeps between turns."


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    merge = config.vision_config.spatial_merge_size
    return in_prompt_order(
        inputs,
        {
            config.image_token_id: grid_segments(inputs.get("image_grid_thw"), merge),
            # Qwen3-VL and later put a timestamp before each frame: a video is one segment of several runs
            config.video_token_id: grid_segments(inputs.get("video_grid_thw"), merge, "video"),
        },
    )


_FEATURES = grid_features(token_ids("image_token_id"), token_ids("video_token_id"))

FAMILIES = (
    Family("qwen2-vl", ("qwen2_vl",), _IDS, _segments, _MROPE, _FEATURES),
    Family("qwen2.5-vl", ("qwen2_5_vl",), _IDS, _segments, _MROPE, _FEATURES),
    Family(
        "qwen3-vl",
        ("qwen3_vl", "qwen3_vl_moe"),
        _IDS,
        _segments,
        f"{_MROPE} Deepstack adds image features after the first layers too, so eviction there loses more.",
        _FEATURES,
    ),
    Family(
        "qwen3.5",
        ("qwen3_5", "qwen3_5_moe"),
        _IDS,
        _segments,
        f"{_MROPE} Only the full-attention layers (one in four) have a KV cache; the others are not touched.",
        _FEATURES,
    ),
)
