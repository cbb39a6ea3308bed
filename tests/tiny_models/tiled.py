# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose images are of the tower's size, or cut into tiles of it; and LFM2-VL."""

from __future__ import annotations

from typing import Any

from . import images
from .configs import LAYERS, LLAMA, MISTRAL, QWEN2, SIGLIP, SIGLIP_FINE, SLIDING, TOWER, alternating, config, text
from .family import TinyFamily
from .stock import ANY, NEWEST, REPEATED, TILED, Stock
from .tokens import BREAK, IMAGE, INDICATORS, TAG, VOCAB


def _idefics3(model_type: str, model_class: str) -> TinyFamily:
    made = config(model_type, text_config=LLAMA, vision_config=TOWER, image_token_id=IMAGE, scale_factor=2)
    return TinyFamily("idefics3", model_class, made, images.idefics3, image_axis=1, stock=REPEATED)


def _cohere2(model_type: str, **options: Any) -> Any:
    return config(
        model_type,
        text_config=text("cohere2", **SLIDING, logit_scale=1.0),
        vision_config=SIGLIP_FINE,
        downsample_factor=2,
        **options,
    )


MODELS = {
    "deepseek-vl": TinyFamily(
        "deepseek-vl",
        "DeepseekVLForConditionalGeneration",
        config("deepseek_vl", text_config=LLAMA, vision_config=SIGLIP, image_token_id=IMAGE),
        images.same_size(),
    ),
    "internvl": TinyFamily(
        "internvl",
        "InternVLForConditionalGeneration",
        config("internvl", text_config=QWEN2, vision_config=TOWER, image_token_id=IMAGE, image_seq_length=16),
        images.internvl,
        images.internvl_video,
        stock=TILED,
    ),
    "idefics2": TinyFamily(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        config(
            "idefics2",
            text_config=MISTRAL,
            vision_config={**TOWER, "patch_size": 8},
            perceiver_config={
                "hidden_size": 48,
                "resampler_n_latents": 12,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 16,
                "num_key_value_heads": 1,
            },
            image_token_id=IMAGE,
        ),
        images.idefics2,
        image_axis=1,
        stock=REPEATED,
    ),
    "idefics3": _idefics3("idefics3", "Idefics3ForConditionalGeneration"),
    "smolvlm": _idefics3("smolvlm", "SmolVLMForConditionalGeneration"),
    "aya-vision": TinyFamily(
        "aya-vision",
        "AyaVisionForConditionalGeneration",
        _cohere2("aya_vision", image_token_index=IMAGE),
        images.cohere(lambda index: [TAG, 3 + index, *images.TILE]),
        stock=TILED,
    ),
    "cohere2-vision": TinyFamily(
        "cohere2-vision",
        "Cohere2VisionForConditionalGeneration",
        _cohere2("cohere2_vision", image_token_id=IMAGE, alignment_intermediate_size=64),
        images.cohere(lambda index: [*images.TILE, BREAK]),
        stock=TILED,
    ),
    "ovis2": TinyFamily(
        "ovis2",
        "Ovis2ForConditionalGeneration",
        config(
            "ovis2",
            text_config=QWEN2,
            vision_config={**TOWER, "hidden_stride": 2, "vocab_size": 64},
            image_token_id=IMAGE,
            visual_indicator_token_ids=list(INDICATORS),
            hidden_size=48,
            vocab_size=VOCAB,
        ),
        images.ovis2,
        # 5.23 cuts the features of a chunk and leaves the indicators behind
        stock=Stock(chunked_prefill=False, expanded_images=ANY if NEWEST else 0),
    ),
    "llama4": TinyFamily(
        "llama4",
        "Llama4ForConditionalGeneration",
        config(
            "llama4",
            text_config=text(
                "llama4_text",
                **alternating("chunked_attention"),
                intermediate_size_mlp=64,
                num_local_experts=2,
                no_rope_layers=[1, 0] * 2,
                attention_chunk_size=32,
            ),
            vision_config={
                **TOWER,
                "intermediate_size": 128,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
            },
            image_token_index=IMAGE,
        ),
        images.llama4,
        # 5.23 expects features of another form than Llama 4 returns; 5.17 repeats tile by tile
        stock=Stock(chunked_prefill=False, expanded_images=0),
    ),
    "lfm2-vl": TinyFamily(
        "lfm2-vl",
        "Lfm2VlForConditionalGeneration",
        config(
            "lfm2_vl",
            text_config=text("lfm2", **alternating("conv"), block_auto_adjust_ff_dim=False),
            vision_config={
                **LAYERS,
                "model_type": "siglip2_vision_model",
                "patch_size": 4,
                "num_patches": 16,
                "vision_use_head": False,
            },
            image_token_id=IMAGE,
            downsample_factor=2,
            projector_hidden_size=48,
        ),
        images.naflex,
    ),
}
