# SPDX-License-Identifier: Apache-2.0
"""A processor for the tiny Qwen2-VL: the real class without its constructor, which asks for torchvision."""

from __future__ import annotations

import importlib
from typing import Any

import tiny_hub
from tiny_models import IMAGE, VIDEO


def processor() -> Any:
    """Its images take as many tokens as their size says."""
    package = "transformers.models.qwen2_vl"
    kind = importlib.import_module(f"{package}.processing_qwen2_vl").Qwen2VLProcessor
    pixels = importlib.import_module(f"{package}.image_processing_pil_qwen2_vl").Qwen2VLImageProcessorPil
    made = object.__new__(kind)
    attributes = {
        "image_processor": pixels(patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}),
        "tokenizer": tiny_hub.tokenizer(),
        "video_processor": None,
        # two images without anything between them would be taken for one
        "chat_template": tiny_hub.CHAT_TEMPLATE.replace("<image>", "<image> "),
        "image_token": "<image>",
        "video_token": f"<unused{VIDEO}>",
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "image_ids": [IMAGE],
        "video_ids": [VIDEO],
        "audio_ids": [],
    }
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made
