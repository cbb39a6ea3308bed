# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: images and videos as grids of merged patches, with m-RoPE."""

from ._segments import grid_features, grids_of_images_and_videos, image_and_video_ids
from .base import Family
from .towers import MERGED_BLOCKS, VisionTower, full_attention_blocks

_MROPE = "Positions are three-dimensional and offset by rope_deltas, which the model keeps between turns."
_FEATURES = grid_features()
_TOWER = VisionTower("visual", "visual.blocks", MERGED_BLOCKS)
_WINDOWED = VisionTower("visual", "visual.blocks", MERGED_BLOCKS, full_attention=full_attention_blocks)


def _family(name: str, model_types: tuple[str, ...], note: str = "", tower: VisionTower = _TOWER) -> Family:
    notes = f"{_MROPE} {note}".strip()
    return Family(name, model_types, image_and_video_ids, grids_of_images_and_videos, notes, _FEATURES, tower)


FAMILIES = (
    _family("qwen2-vl", ("qwen2_vl",)),
    _family("qwen2.5-vl", ("qwen2_5_vl",), tower=_WINDOWED),
    _family(
        "qwen3-vl",
        ("qwen3_vl", "qwen3_vl_moe"),
        "Deepstack adds image features after the first layers too, so eviction there loses more.",
    ),
    _family(
        "qwen3.5",
        ("qwen3_5", "qwen3_5_moe"),
        "Only the full-attention layers (one in four) have a KV cache; the others are not touched.",
    ),
)
