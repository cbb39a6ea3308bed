# SPDX-License-Identifier: Apache-2.0
"""Tiny models that take flattened patches with their grids: Qwen, GLM-4V and EXAONE."""

from __future__ import annotations

from typing import Any

from . import images
from .configs import SLIDING, Part, alternating, config, mrope, text
from .family import TinyFamily
from .stock import GLM, REPEATED, TILED, Stock
from .tokens import END, IMAGE, START, VIDEO, VIDEO_END, VIDEO_START

_TOWER: Part = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 48,
}
_MERGED: Part = {"spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN2_TOWER: Part = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "patch_size": 4, **_MERGED}
_QWEN25_TOWER: Part = {**_TOWER, **_MERGED, "window_size": 16, "fullatt_block_indexes": [1]}
_QWEN35_TOWER: Part = {**_TOWER, "depth": 3, "num_position_embeddings": 64}
_QWEN3_TOWER: Part = {**_QWEN35_TOWER, "deepstack_visual_indexes": [0, 1]}
_GLM_TOWER: Part = {**_TOWER, "image_size": 32}

_INTERLEAVED: Part = {"mrope_interleaved": True}
_MIXED_LAYERS: Part = {
    "rope": {**_INTERLEAVED, "partial_rotary_factor": 1.0},
    **alternating("linear_attention"),
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS: Part = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


_QWEN_IDS: Part = {"vision_start_token_id": START, "vision_end_token_id": END}
_GLM_IDS: Part = {
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}


def _model(
    family: str, model: tuple[str, str], videos: images.Encode, stock: Stock, text_config: Part, **parts: Any
) -> TinyFamily:
    """Return the model of a ``(model type, prefix of the class)``; parts are the tower and the ids of markers."""
    model_type, prefix = model
    return TinyFamily(
        family,
        f"{prefix}ForConditionalGeneration",
        config(model_type, text_config=text_config, image_token_id=IMAGE, video_token_id=VIDEO, **parts),
        images.image_grids,
        videos,
        token_types="mm_token_type_ids",
        stock=stock,
    )


def _qwen(
    family: str,
    model: tuple[str, str],
    text_config: Part,
    tower: Part,
    videos: images.Encode = images.timed_video_grids,
) -> TinyFamily:
    return _model(family, model, videos, REPEATED, text_config, vision_config=tower, **_QWEN_IDS)


def _glm(model: tuple[str, str], text_config: Part, tower: Part) -> TinyFamily:
    return _model("glm4v", model, images.glm_video_grids, GLM, text_config, vision_config=tower, **_GLM_IDS)


MODELS = {
    "qwen2-vl": _qwen("qwen2-vl", ("qwen2_vl", "Qwen2VL"), mrope("qwen2_vl_text"), _QWEN2_TOWER, images.video_grids),
    "qwen2.5-vl": _qwen(
        "qwen2.5-vl", ("qwen2_5_vl", "Qwen2_5_VL"), mrope("qwen2_5_vl_text"), _QWEN25_TOWER, images.video_grids
    ),
    "qwen3-vl": _qwen(
        "qwen3-vl",
        ("qwen3_vl", "Qwen3VL"),
        mrope("qwen3_vl_text", _INTERLEAVED, num_hidden_layers=4),
        _QWEN3_TOWER,
    ),
    "qwen3-vl-moe": _qwen(
        "qwen3-vl",
        ("qwen3_vl_moe", "Qwen3VLMoe"),
        mrope("qwen3_vl_moe_text", _INTERLEAVED, num_experts=4, **_EXPERTS),
        _QWEN3_TOWER,
    ),
    "qwen3.5": _qwen("qwen3.5", ("qwen3_5", "Qwen3_5"), mrope("qwen3_5_text", **_MIXED_LAYERS), _QWEN35_TOWER),
    "qwen3.5-moe": _qwen(
        "qwen3.5",
        ("qwen3_5_moe", "Qwen3_5Moe"),
        mrope("qwen3_5_moe_text", num_experts=4, shared_expert_intermediate_size=32, **_MIXED_LAYERS, **_EXPERTS),
        _QWEN35_TOWER,
    ),
    "glm4v": _glm(("glm4v", "Glm4v"), mrope("glm4v_text"), _GLM_TOWER),
    "glm46v": _glm(("glm46v", "Glm46V"), mrope("glm4v_text"), {"model_type": "glm4v_vision", **_GLM_TOWER}),
    "glm4v-moe": _glm(
        ("glm4v_moe", "Glm4vMoe"),
        mrope("glm4v_moe_text", {"partial_rotary_factor": 1.0}, n_routed_experts=4, **_EXPERTS),
        _GLM_TOWER,
    ),
    "exaone4.5": TinyFamily(
        "exaone4.5",
        "Exaone4_5_ForConditionalGeneration",
        config(
            "exaone4_5",
            text_config=text("exaone4", **SLIDING),
            vision_config={**_QWEN25_TOWER, "num_key_value_heads": 1},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        images.image_grids,
        images.video_grids,
        stock=TILED,
    ),
}
