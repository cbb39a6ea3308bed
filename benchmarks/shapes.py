# SPDX-License-Identifier: Apache-2.0
"""Text models in the shapes of public checkpoints, with random weights, in a vision-language model."""

from __future__ import annotations

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

SHAPES = {
    "tiny": {
        "hidden": 64, "intermediate": 128, "layers": 3, "heads": 4, "kv_heads": 2, "vocabulary": 512, "tied": True,
    },
    "0.5B": {
        "hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "vocabulary": 151936,
        "tied": True,
    },
    "2B": {
        "hidden": 1536, "intermediate": 8960, "layers": 28, "heads": 12, "kv_heads": 2, "vocabulary": 151936,
        "tied": True,
    },
    "7B": {
        "hidden": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocabulary": 152064,
        "tied": False,
    },
    "32B": {
        "hidden": 5120, "intermediate": 27648, "layers": 64, "heads": 40, "kv_heads": 8, "vocabulary": 152064,
        "tied": False,
    },
}  # fmt: skip
"""Of Qwen2-0.5B, Qwen2-VL-2B, Qwen2-7B and Qwen2.5-VL-32B, and one to try the scripts with."""
IMAGE, TEXT_TOKENS = 7, 100
"""Token id of an image; text tokens of every prompt."""


def build_model(shape: str, dtype: torch.dtype, device: torch.device) -> LlavaForConditionalGeneration:
    """Make a LLaVA with a Qwen2 text model of a shape and a small tower: no benchmark here reads pixels."""
    size = SHAPES[shape]
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=131072,
        tie_word_embeddings=size["tied"],
        bos_token_id=None,
        eos_token_id=None,
    )
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=378, patch_size=14
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=size["tied"],
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval()
