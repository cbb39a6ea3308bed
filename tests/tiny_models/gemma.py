# SPDX-License-Identifier: Apache-2.0
"""Tiny models on the text models of Gemma."""

from __future__ import annotations

from typing import Any

from . import images
from .configs import LAYERS, SIGLIP, SIGLIP_FINE, SLIDING, Part, config, text
from .family import TinyFamily
from .stock import NEWEST, PREFIX, Stock
from .tokens import BOS, END, IMAGE, START, VIDEO, VOCAB


def _paligemma(text_config: Part) -> TinyFamily:
    return TinyFamily(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        config(
            "paligemma",
            text_config=text_config,
            vision_config=SIGLIP,
            image_token_index=IMAGE,
            projection_dim=48,
        ),
        images.same_size(end=[BOS]),
        token_types="token_type_ids",
        prefix_types=True,
        stock=PREFIX,
    )


def _gemma4(stock: Stock, **changes: Any) -> TinyFamily:
    return TinyFamily(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        config(
            "gemma4",
            text_config=text(
                "gemma4_text",
                **SLIDING,
                global_head_dim=16,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=VOCAB,
                use_bidirectional_attention="vision",
                **changes,
            ),
            vision_config={
                **LAYERS,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
            },
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            boi_token_id=START,
            eoi_token_id=END,
        ),
        images.gemma4,
        token_types="mm_token_type_ids",
        stock=stock,
    )


MODELS = {
    "gemma3": TinyFamily(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        config(
            "gemma3",
            text_config=text("gemma3_text", **SLIDING, query_pre_attn_scalar=12),
            vision_config=SIGLIP_FINE,
            mm_tokens_per_image=16,
            boi_token_index=START,
            eoi_token_index=END,
            image_token_index=IMAGE,
        ),
        images.same_size([START], [END]),
        token_types="token_type_ids",
        stock=Stock(second_turn_image=NEWEST, chunked_prefill=False),
    ),
    "gemma4": _gemma4(Stock(chunked_prefill=False)),
    "paligemma": _paligemma(text("gemma")),
}

PALIGEMMA2 = _paligemma(
    text(
        "gemma2",
        **SLIDING,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=5.0,
    )
)
GEMMA4_SHARED = _gemma4(Stock(), num_kv_shared_layers=2)  # E2B and E4B
