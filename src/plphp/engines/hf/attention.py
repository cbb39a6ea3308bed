# SPDX-License-Identifier: Apache-2.0
"""The attention function that plphp registers with transformers: the one place where the flow meets the models.

With a `PrunedCache` it attends, then lets the cache score, allocate, select and compact. With any other cache it
is the attention that the model had before.

Transformers hands an attention function keys and values, and no cache. So the cache marks the keys that it returns for
a layer (`plphp.engines.hf.guarded.PendingUpdate`), and here the mark is read. A model that copies its keys in between
loses the mark and attends without the prefix, which the cache notices at its next update.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plphp.errors import UnsupportedFeatureError, UnsupportedModelError
from plphp.kernels import decode_attention
from plphp.pruning.packing import gathered

from .cache_argument import NAME, NAMES
from .packed_masks import Attention

PREFIX = "plphp_"
SUPPORTED_BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
UNSUPPORTED_TERMS = ("softcap", "s_aux", "position_bias", "cache")
"""Keyword arguments that change the softmax or the keys, so that scores without them would be wrong."""

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod[Callable[[], None]]] = weakref.WeakKeyDictionary()
"""By an attention module, the method to call when it attends without a `PrunedCache`.

Both are weak: the function is registered for the life of the process and must keep no model alive.
"""


def register(base: str) -> str:
    """Register plphp's attention on top of an attention implementation of transformers, and return its name.

    Parameters
    ----------
    base : str
        Name of the attention that the model uses, for example ``"sdpa"``.

    Raises
    ------
    UnsupportedFeatureError
        If plphp cannot stand in for this attention.
    """
    if base.startswith(PREFIX):
        raise UnsupportedFeatureError(
            "The config object of this model is also that of a model on which plphp is in use: give each a config of "
            "its own (copy.deepcopy)."
        )
    if base not in SUPPORTED_BASES:
        raise UnsupportedFeatureError(
            f"plphp works on top of the attention implementations {', '.join(SUPPORTED_BASES)}, and this model uses "
            f"{base!r}: call model.set_attn_implementation('sdpa') first."
        )
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_over(base))
        # Without a mask function of the same name, transformers silently drops the padding mask.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _attention_over(base: str) -> Attention:
    """Make the attention function that stands in for ``base``."""

    def plphp_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        pending = getattr(key, "plphp_pending", None)
        if pending is None:
            if _watched:
                _note_stock(module)
            _refuse_stray_cache(kwargs)
            gaps = getattr(key, "plphp_gaps", None)
            if gaps is not None:
                attention_mask = gaps.mask(attention_mask, query)
            return stock_attention(base, module)(module, query, key, value, attention_mask, **kwargs)
        pending.cache.check_reader(module)
        _refuse_unsupported_terms(module, kwargs)
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        attend = partial(stock_attention(base, module), module, **kwargs)
        layer = pending.cache.layers[pending.layer]
        packing = pending.cache.before_attention(pending.layer, query, scaling)
        prefix = layer.prefix
        if prefix is None:
            # Under autocast keys may be wider than values; a dynamic cache would have widened the values to them.
            value = value.to(torch.promote_types(key.dtype, value.dtype))
        if pending.cache.tail_bias is not None:
            # In a CUDA graph the tail comes with the room behind it, which only this mask hides.
            attention_mask = pending.cache.tail_bias
        elif packing is not None or layer.packing is not None:
            attention_mask = pending.cache.packed_mask(layer, attention_mask, query, packing)
        asking = query
        if packing is not None:
            entries = packing.behind(key.shape[2] - query.shape[2])
            asking = gathered(query, packing.rows, 2, batch=0)
            key, value = (gathered(states, entries, 2, batch=0) for states in (key, value))
        if prefix is None:
            output, _ = attend(asking, key, value, attention_mask)
        else:
            output = decode_attention(asking, prefix, key, value, attention_mask, scaling, layer.coded)
        if packing is not None:
            output = packing.spread_tokens(output)
        pending.cache.after_attention(pending.layer, query, scaling)
        return output, None

    plphp_attention.__name__ = f"plphp_over_{base}"
    return plphp_attention


def watch(modules: Iterable[nn.Module], note: Callable[[], None]) -> None:
    """Call the method ``note`` whenever one of these modules attends without a `PrunedCache`."""
    for module in modules:
        _watched[module] = weakref.WeakMethod(note)


def unwatch(modules: Iterable[nn.Module]) -> None:
    """End `watch`."""
    for module in modules:
        _watched.pop(module, None)


@torch.compiler.disable  # a compiled model would go on with what was watched when it was compiled
def _note_stock(module: nn.Module) -> None:
    method = _watched.get(module)
    note = None if method is None else method()
    if note is not None:
        note()


def _refuse_stray_cache(kwargs: dict[str, Any]) -> None:
    """Raise where a model took a `PrunedCache` for one of the arguments that it hands to its attention."""
    for name in NAMES:
        if hasattr(kwargs.get(name), "after_attention"):
            raise UnsupportedFeatureError(
                f"This version of transformers does not take a cache as {name}, and would run without it: pass {NAME}."
            )


def stock_attention(base: str, module: nn.Module) -> Attention:
    """Return the attention function that the module would call without plphp."""
    if base != "eager":
        function: Attention = ALL_ATTENTION_FUNCTIONS[base]
        return function
    # Transformers keeps eager attention in the modeling file of each model, not in the registry.
    eager: Attention | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedFeatureError(
            f"{type(module).__name__} has no eager_attention_forward in its modeling file: call "
            "model.set_attn_implementation('sdpa') first."
        )
    return eager


def _refuse_unsupported_terms(module: nn.Module, kwargs: dict[str, Any]) -> None:
    if module.training:
        raise UnsupportedFeatureError(
            "The model is in training mode, where dropout changes the attention: call model.eval() first."
        )
    present = [name for name in UNSUPPORTED_TERMS if kwargs.get(name) is not None]
    if present:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(present)} to its attention, which plphp does not implement."
        )
