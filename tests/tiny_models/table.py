# SPDX-License-Identifier: Apache-2.0
"""All tiny models by name."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import transformers

from precision import working_dtype

from . import gemma, llava, qwen, tiled
from .configs import heads_of_eight
from .family import TinyFamily

TINY: dict[str, TinyFamily] = {**llava.MODELS, **qwen.MODELS, **tiled.MODELS, **gemma.MODELS}

if transformers.__version__ == "5.24.0":
    del TINY["llama4"]  # stops at the end of every pass there, without plphp too: no attribute 'image_outputs'

REFUSED: dict[str, TinyFamily] = {
    "paligemma2": gemma.PALIGEMMA2,
    "gemma4-shared": gemma.GEMMA4_SHARED,
    "mistral3-mla": llava.MISTRAL3_MLA,
}
"""Models of known families that are refused for their text model: capped scores, shared or latent KV."""


TIERS: dict[str, TinyFamily] = {
    name: dataclasses.replace(family, config=heads_of_eight(family.config)) for name, family in TINY.items()
}
"""The same with heads of 8 channels: tiers hold heads whose channels 8 divides."""


def tiers_model(name: str, dtype: torch.dtype | None = None) -> Any:
    """Return the model of `TIERS` of a name, as `tiny_model` does."""
    return _shared_tiers(name, dtype or working_dtype())


def tiny_model(name: str, dtype: torch.dtype | None = None) -> Any:
    """Return the tiny model of a name, shared by all tests of a process; see `TinyFamily.build` for ``dtype``."""
    return _shared(name, dtype or working_dtype())


@functools.cache
def _shared(name: str, dtype: torch.dtype) -> Any:
    return TINY[name].build(dtype=dtype)


@functools.cache
def _shared_tiers(name: str, dtype: torch.dtype) -> Any:
    return TIERS[name].build(dtype=dtype)
