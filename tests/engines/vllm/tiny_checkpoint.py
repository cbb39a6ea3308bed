# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen2.5-VL with its processor as a folder in the hub's format, of a shape that vLLM's CPU attention reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from tiny_models import randomize

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 32
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
BYTES = 256
IDS = {token: BYTES + number for number, token in enumerate(SPECIAL)}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if 'image' in part['type'] %}" + IMAGE + "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> Qwen2TokenizerFast:
    """One token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(list(SPECIAL))
    made = Qwen2TokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = CHAT_TEMPLATE
    return made


def config() -> Qwen2_5_VLConfig:
    """The model's; a vision token covers 28 x 28 pixels."""
    width = Q_HEADS * HEAD_DIM
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": BYTES + len(SPECIAL),
            "hidden_size": width,
            "intermediate_size": 384,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": Q_HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": IDS["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IDS["<|image_pad|>"],
        video_token_id=IDS["<|video_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def model() -> Any:
    """With weights that make attention and greedy answers vary, and that never answer with a special token."""
    torch.manual_seed(0)
    made = Qwen2_5_VLForConditionalGeneration(config())
    randomize(made, 0)
    made.lm_head.weight.data[BYTES:] = 0
    return made.eval()


def save(folder: Path) -> Path:
    """Write the model and its processor."""
    tokens = tokenizer()
    if {token: tokens.convert_tokens_to_ids(token) for token in SPECIAL} != IDS:
        raise ValueError("The special tokens are not where the model's config says.")
    made = model()
    made.generation_config.eos_token_id = IDS["<|im_end|>"]
    made.generation_config.pad_token_id = IDS["<|endoftext|>"]
    made.save_pretrained(folder)
    tokens.save_pretrained(folder)
    pixels = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 256,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    video = {**pixels, "video_processor_type": "Qwen2VLVideoProcessor", "do_sample_frames": False}
    del video["image_processor_type"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video), encoding="utf-8")
    return folder
