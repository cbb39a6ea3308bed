# SPDX-License-Identifier: Apache-2.0
"""The attention function that plphp registers with transformers: the one place where the flow meets the models.

With a `PrunedCache` it attends, then lets the cache score, allocate, select and compact. With any other cache it
is the attention that the model had before.
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

from .cache_argument import NAME, NAMES

PREFIX = "plphp_"
SUPPORTED_BASES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
UNSUPPORTED_TERMS = ("softcap", "s_aux", "position_bias", "cache")
"""Keyword arguments that change the softmax or the keys, so that scores without them would be wrong."""

Result = tuple[Tensor, Tensor | None]

_watched: weakref.WeakKeyDictionary[nn.Module, weakref.WeakMethod[Callable[[], None]]] = weakref.WeakKeyDictionary()
"""By a module of a model, what wants to know when it attends without a `PrunedCache`."""


def register(base: str) -> str:
    """Register plphp's attention on top of one of transformers' and return its name.

    Parameters
    ----------
    base : str
        Name of the attention that the model uses, for example ``"sdpa"``.

    Raises
    ------
    UnsupportedFeatureError
        If the attention is one that plphp cannot stand in for.
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


def _attention_over(base: str) -> Callable[..., Result]:
    """Make the attention function that stands in for ``base``."""

    def plphp_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Result:
        pending = getattr(key, "plphp_pending", None)
        if pending is None:
            if _watched:
                _note_stock(module)
            _refuse_stray_cache(kwargs)
            return _stock(base, module)(module, query, key, value, attention_mask, **kwargs)
        pending.cache.check_reader(module)
        _refuse_unsupported_terms(module, kwargs)
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        attend = partial(_stock(base, module), module, **kwargs)
        prefix = pending.cache.layers[pending.layer].prefix
        if prefix is None:  # in a dynamic cache values have no fewer bits than keys
            value = value.to(torch.promote_types(key.dtype, value.dtype))
        hidden = pending.cache.hidden(pending.layer)
        if pending.cache.tail_bias is not None:
            attention_mask = pending.cache.tail_bias
        if hidden is not None and prefix is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]:
            output = _among_shown(attend, query, key, value, attention_mask, hidden.to(key.device))
        else:
            if hidden is not None:
                attention_mask = hide(attention_mask, hidden.to(key.device), query.shape[2])
            if prefix is None:
                output, _ = attend(query, key, value, attention_mask)
            else:
                output = decode_attention(query, prefix, key, value, attention_mask, scaling)
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


@torch.compiler.disable  # what was compiled before the session would not see it
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


def hide(mask: Tensor | None, hidden: Tensor, query_length: int) -> Tensor:
    """Hide entries of the tail from every query but their own.

    Parameters
    ----------
    mask : Tensor, optional
        What transformers made, bool or additive [batch or 1, q_heads or 1, query, tail]; None is causal.
    hidden : Tensor
        bool [batch, tail]. A hidden token sees itself, or its attention would be that of an empty row.
    query_length : int
        The queries are the last ``query_length`` positions of the tail.

    Returns
    -------
    Tensor
        bool or additive [batch, q_heads or 1, query, tail].
    """
    tail = hidden.shape[1]
    place = torch.arange(tail, device=hidden.device)
    query = place[tail - query_length :, None]
    shown = ~hidden[:, None, None] | (place == query)
    if mask is None:
        return shown & (place <= query)
    if mask.dtype is torch.bool:
        return mask & shown
    return torch.where(shown, mask, torch.finfo(mask.dtype).min)


def _among_shown(
    attend: Callable[..., Result], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, hidden: Tensor
) -> Tensor:
    """The same as with the mask of `hide` for one whole prompt, but for hidden tokens, which cost nothing here."""
    shown = (~hidden[0]).nonzero()[:, 0]
    mask = None if mask is None else mask[..., shown, :][..., shown]
    found, _ = attend(*(states[:, :, shown] for states in (query, key, value)), mask)
    # A hidden token sees itself alone and gets its own value; nobody reads what becomes of it.
    own = value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)
    output = own.to(found.dtype).contiguous()
    output[:, shown] = found
    return output


def _stock(base: str, module: nn.Module) -> Callable[..., Result]:
    """The attention function that the module would call without plphp."""
    if base != "eager":
        function: Callable[..., Result] = ALL_ATTENTION_FUNCTIONS[base]
        return function
    # Transformers keeps eager attention in the modeling file of each model, not in the registry.
    found = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise UnsupportedFeatureError(
            f"{type(module).__name__} has no eager_attention_forward in its modeling file: call "
            "model.set_attn_implementation('sdpa') first."
        )
    eager: Callable[..., Result] = found
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
