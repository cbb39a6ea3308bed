# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the LLaVA line, and those with a Pixtral tower."""

from __future__ import annotations

from typing import Any

from . import images
from .configs import CLIP, LLAMA, MISTRAL, PIXTRAL, QWEN2, SIGLIP, Part, config, text
from .family import TinyFamily
from .tokens import IMAGE, VIDEO


def _llava(text_config: Part, vision_config: Part, encode: images.Encode, **options: Any) -> TinyFamily:
    made = config("llava", text_config=text_config, vision_config=vision_config, image_token_index=IMAGE, **options)
    return TinyFamily("llava", "LlavaForConditionalGeneration", made, encode)


def _anyres(
    family: str,
    model_class: str,
    text_config: Part,
    vision_config: Part,
    videos: images.Encode | None = None,
    **options: Any,
) -> TinyFamily:
    made = config(
        family.replace("-", "_"),
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=IMAGE,
        image_grid_pinpoints=images.PINPOINTS,
        **options,
    )
    return TinyFamily(family, model_class, made, images.anyres, videos)


def _mistral3(text_config: Part) -> TinyFamily:
    return TinyFamily(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        config(
            "mistral3",
            text_config=text_config,
            vision_config=PIXTRAL,
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        images.pixtral,
    )


MODELS = {
    "llava": _llava(LLAMA, CLIP, images.same_size()),
    "llava-siglip": _llava(LLAMA, SIGLIP, images.same_size(), vision_feature_select_strategy="full"),  # Mantis
    "llava-pixtral": _llava(
        MISTRAL, PIXTRAL, images.pixtral, vision_feature_select_strategy="full", vision_feature_layer=-1
    ),
    "vipllava": TinyFamily(
        "vipllava",
        "VipLlavaForConditionalGeneration",
        config(
            "vipllava",
            text_config=LLAMA,
            vision_config=CLIP,
            image_token_index=IMAGE,
            vision_feature_layers=[-2, -1],
            vision_feature_layer=[-2, -1],
        ),
        images.same_size(),
    ),
    "llava-next": _anyres("llava-next", "LlavaNextForConditionalGeneration", MISTRAL, CLIP),
    "llava-next-video": _anyres(
        "llava-next-video",
        "LlavaNextVideoForConditionalGeneration",
        LLAMA,
        CLIP,
        images.clip(3, 3 * 4),
        video_token_index=VIDEO,
    ),
    "llava-onevision": _anyres(
        "llava-onevision",
        "LlavaOnevisionForConditionalGeneration",
        QWEN2,
        SIGLIP,
        images.clip(3, 3 * 4 + 1),
        video_token_index=VIDEO,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    ),
    "mistral3": _mistral3(MISTRAL),
    "lighton-ocr": TinyFamily(
        "lighton-ocr",
        "LightOnOcrForConditionalGeneration",
        config(
            "lighton_ocr",
            text_config=text("qwen3", use_sliding_window=False),
            vision_config=PIXTRAL,
            image_token_id=IMAGE,
            spatial_merge_size=2,
        ),
        images.lighton,
    ),
}

MISTRAL3_MLA = _mistral3(  # Mistral Small 4
    text(
        "mistral4",
        head_dim=12,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_shared_experts=1,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
    )
)
