# SPDX-License-Identifier: Apache-2.0
"""Text models in the shapes of public checkpoints, with random weights, in a vision-language model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 text model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "tiny": Shape(64, 128, 3, 4, 2, 512, tied=True),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936, tied=True),
    "2B": Shape(1536, 8960, 28, 12, 2, 151936, tied=True),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064, tied=False),
    "32B": Shape(5120, 27648, 64, 40, 8, 152064, tied=False),
}
"""Of Qwen2-0.5B, Qwen2-VL-2B, Qwen2-7B and Qwen2.5-VL-32B, and one to try the scripts with."""
IMAGE, TEXT_TOKENS = 7, 100
"""Token id of an image; text tokens of every prompt."""


SMALL = SiglipVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=378, patch_size=14
)
SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=378,
    patch_size=14,
)
"""Vision towers with 729 tokens an image: one for benchmarks that read no pixels, and that of SigLIP so400m."""


def build_model(
    shape: str, dtype: torch.dtype, device: torch.device, tower: SiglipVisionConfig = SMALL
) -> LlavaForConditionalGeneration:
    """Make a LLaVA with a Qwen2 text model of a shape."""
    size = SHAPES[shape]
    torch.manual_seed(0)
    text = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=131072,
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=size.tied,
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval()


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Make a second model with the same weights, so that plphp's attention is never in the way of the first."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
