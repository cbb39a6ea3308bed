# SPDX-License-Identifier: Apache-2.0
"""Parts of the tiny configurations that several models share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig

from .tokens import BOS, EOS, PAD, VOCAB

Part = dict[str, Any]


def config(model_type: str, **parts: Any) -> Callable[[], Any]:
    """Return a function that makes a fresh configuration, which shares no list with those of other models."""
    return lambda: AutoConfig.for_model(model_type, tie_word_embeddings=False, **copy.deepcopy(parts))


# --- text models ------------------------------------------------------------------------------------------

_TEXT: Part = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


def text(model_type: str, **changes: Any) -> Part:
    """Return the text config of a model type."""
    return {"model_type": model_type, **_TEXT, **changes}


def mrope(model_type: str, rope: Part | None = None, **changes: Any) -> Part:
    """Return the text config of a model type with three-dimensional positions."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], **(rope or {})}
    return text(model_type, rope_parameters=parameters, **changes)


def heads_of_eight(made: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that makes the same configuration with heads of 8 channels, which tiers can hold."""

    def narrowed() -> Any:
        whole = made()
        own = whole.get_text_config()
        own.num_attention_heads, own.num_key_value_heads, own.head_dim = 6, 2, 8
        rope = getattr(own, "rope_parameters", None) or {}
        if "mrope_section" in rope:
            rope["mrope_section"] = [2, 1, 1]
        return whole

    return narrowed


def alternating(layer_type: str) -> Part:
    """Return four layers, every second of them with full attention."""
    return {"num_hidden_layers": 4, "layer_types": [layer_type, "full_attention"] * 2}


SLIDING = {**alternating("sliding_attention"), "sliding_window": 16}

LLAMA = text("llama")
MISTRAL = text("mistral", sliding_window=None)
QWEN2 = text("qwen2", use_sliding_window=False)

# --- vision towers ----------------------------------------------------------------------------------------

LAYERS: Part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER: Part = {**LAYERS, "image_size": 32, "patch_size": 4}
CLIP: Part = {**TOWER, "model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 32}
SIGLIP: Part = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
SIGLIP_FINE: Part = {**SIGLIP, "patch_size": 4}
PIXTRAL: Part = {**LAYERS, "model_type": "pixtral", "head_dim": 16, "image_size": 64, "patch_size": 8}
