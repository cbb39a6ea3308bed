# SPDX-License-Identifier: Apache-2.0
"""The image processors of transformers for the tiny models, and pictures for them.

They are the processors on PIL: those on tensors need torchvision.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from PIL import Image

from tiny_models import PINPOINTS

SIZES = ((50, 40), (24, 70), (90, 30), (64, 64), (33, 95), (31, 200), (128, 17))
"""(height, width) of the pictures in pixels."""


def pictures() -> list[Image.Image]:
    """Return pictures of noise."""
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def load(module: str, name: str) -> Any:
    """Return a class of a model's folder in transformers."""
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


_SQUARE = {"height": 32, "width": 32}
_CLIP = {"size": {"shortest_edge": 32}, "crop_size": _SQUARE}
_CROPS = {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
_GRIDS = {"patch_size": 4, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
_SPLIT = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}

PROCESSORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("llava", "Llava", _CLIP),
    "llava-pixtral": ("pixtral", "Pixtral", {"size": {"longest_edge": 96}, "patch_size": 8}),
    "mistral3": ("pixtral", "Pixtral", {"size": {"longest_edge": 96}, "patch_size": 16}),
    "llava-next": ("llava_next", "LlavaNext", {**_CLIP, "image_grid_pinpoints": PINPOINTS}),
    "llava-onevision": ("llava_onevision", "LlavaOnevision", {"size": _SQUARE, "image_grid_pinpoints": PINPOINTS}),
    "qwen2-vl": ("qwen2_vl", "Qwen2VL", _GRIDS),
    "glm4v": ("glm4v", "Glm4v", _GRIDS),
    "internvl": ("got_ocr2", "GotOcr2", _CROPS),
    "ovis2": ("ovis2", "Ovis2", _CROPS),
    "idefics2": ("idefics2", "Idefics2", {"size": {"shortest_edge": 24, "longest_edge": 32}}),
    "idefics3": ("idefics3", "Idefics3", _SPLIT),
    "smolvlm": ("smolvlm", "SmolVLM", _SPLIT),
    "gemma3": ("gemma3", "Gemma3", {"size": _SQUARE}),
    "gemma4": ("gemma4", "Gemma4", {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
}
"""Module, prefix of the class, and options, by tiny model."""


def image_processor(name: str) -> Any:
    """Return the image processor of a tiny model."""
    module, prefix, options = PROCESSORS[name]
    return load(f"{module}.image_processing_pil_{module}", f"{prefix}ImageProcessorPil")(**options)
