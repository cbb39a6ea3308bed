# SPDX-License-Identifier: Apache-2.0
"""The attention function of a vision tower while it is recorded.

It attends as the model would without plphp, and hands queries and keys to the listeners of this context beside that. It
is registered for the life of the process; `plphp.engines.hf.tower_attachment` gives a model its name for a while.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plphp.errors import UnsupportedFeatureError

from .attention import PREFIX, SUPPORTED_BASES, stock_attention
from .packed_masks import Attention


class Listener(Protocol):
    """Who is told what the vision towers of models do in a context."""

    def begin(self, tower: nn.Module) -> None:
        """Note that a tower starts to read images."""

    def end(self, tower: nn.Module) -> None:
        """Note that a tower has read them."""

    def attended(self, layer: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: Any) -> None:
        """Note queries and keys of an attention layer, with the options of its attention function."""


listeners: ContextVar[tuple[Listener, ...]] = ContextVar("plphp_tower_listeners", default=())
"""Who listens in this context."""


def register_recorded(base: str) -> str:
    """Register the attention that stands in for ``base`` in a vision tower, and return its name."""
    if base.startswith(PREFIX):
        raise UnsupportedFeatureError(
            "The config object of this vision tower is also that of a tower that is being recorded: give each model a "
            "config of its own (copy.deepcopy)."
        )
    if base not in SUPPORTED_BASES:
        raise UnsupportedFeatureError(
            f"plphp records vision towers with the attention implementations {', '.join(SUPPORTED_BASES)}, and this "
            f"tower uses {base!r}: call model.set_attn_implementation('sdpa') first."
        )
    name = f"{PREFIX}tower_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _recorded(base))
        # Without a mask function of the same name, transformers silently drops the padding mask.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _recorded(base: str) -> Attention:
    """Make the attention function that stands in for ``base``."""

    def plphp_tower_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        _tell(module, query, key, attention_mask, kwargs)
        return _stock(base, module)(module, query, key, value, attention_mask, **kwargs)

    plphp_tower_attention.__name__ = f"plphp_tower_over_{base}"
    return plphp_tower_attention


def _stock(base: str, module: nn.Module) -> Attention:
    """Return the attention function that the module would call without plphp."""
    # The file of Llama 4 has an eager attention for the text model and one for the tower.
    of_tower: Attention | None = getattr(sys.modules[type(module).__module__], "vision_eager_attention_forward", None)
    return of_tower if base == "eager" and of_tower is not None else stock_attention(base, module)


@torch.compiler.disable  # a compiled tower would go on with who listened when it was compiled
def _tell(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
    for listener in listeners.get():
        listener.attended(module, query, key, mask, options)
