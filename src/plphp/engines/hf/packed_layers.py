# SPDX-License-Identifier: Apache-2.0
"""Decoder layers that get the tokens which are still there, while all around them keeps the whole prompt.

A hook before each layer packs what the layer is given: states, positions, rotary tables, the padding mask of a layer
with a recurrent state. Masks of attention are cut where they are read (`plphp.engines.hf.packed_masks`). A hook behind
the last layer puts the states back to their places, 0 where a token has left.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from plphp.errors import UnsupportedModelError
from plphp.pruning.packing import Packing, gathered

from .cache_argument import NAMES

DEEPSTACK = "_deepstack_process"
"""The method of a text model that adds image features behind its first layers (Qwen3-VL)."""
STATES = "hidden_states"


class PackingCache(Protocol):
    """What the hooks ask of a cache."""

    def enter_layer(self, number: int, states: Tensor) -> tuple[Tensor, Packing | None]: ...
    def leave_layers(self) -> Packing | None: ...


class PackedLayers:
    """The hooks on the decoder layers of one model.

    Parameters
    ----------
    decoder : Module
        The text model, or what holds it.
    layers : int
        Its decoder layers.

    Raises
    ------
    UnsupportedModelError
        If its layers are not found.
    """

    def __init__(self, decoder: nn.Module, layers: int) -> None:
        text_model = next((part for part in decoder.modules() if _decoder_layers(part, layers)), None)
        if text_model is None:
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has no list of {layers} decoder layers, so no token can leave before them: "
                "take a method that acts on the KV cache."
            )
        self._handles: list[RemovableHandle] = []
        deepstack = hasattr(text_model, DEEPSTACK)
        for number, layer in enumerate(_decoder_layers(text_model, layers)):
            names = list(inspect.signature(layer.forward).parameters)
            hook = partial(_before, number, names)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if number == layers - 1:
                self._handles.append(layer.register_forward_hook(_behind_the_last, with_kwargs=True))
            elif deepstack:
                self._handles.append(layer.register_forward_hook(_marked, with_kwargs=True))
        self._text_model = weakref.ref(text_model)
        if deepstack:
            text_model.__dict__[DEEPSTACK] = partial(_deepstack, getattr(text_model, DEEPSTACK))

    def remove(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()
        text_model = self._text_model()
        if text_model is not None:
            text_model.__dict__.pop(DEEPSTACK, None)


def _decoder_layers(module: nn.Module, number: int) -> list[nn.Module]:
    """The decoder layers that a module is made of; none where it is not made of so many."""
    layers = getattr(module, "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) and len(layers) == number else []


def _cache_of(kwargs: Mapping[str, Any]) -> PackingCache | None:
    cache = next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)
    return cache if hasattr(cache, "enter_layer") else None


def _before(
    number: int, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Pack what a layer is given."""
    cache = _cache_of(kwargs)
    if cache is None:
        return None
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    states, packing = cache.enter_layer(number, given[STATES])
    if packing is None:
        return None
    linear = not hasattr(module, "self_attn")
    packed = {
        name: states if name == STATES else _packed(name, value, packing, linear) for name, value in given.items()
    }
    return tuple(packed[name] for name in names[: len(args)]), {name: packed[name] for name in kwargs}


def _packed(name: str, value: Any, packing: Packing, linear: bool) -> Any:
    """What a layer is given under a name, of the tokens that are there.

    Raises
    ------
    UnsupportedModelError
        If it is not known which of its dimensions is the tokens.
    """
    if name == "attention_mask" and (value is None or value.ndim == 4):
        # Of attention, cut where it is read. A recurrent state is to hear of no token that only fills a row up.
        return packing.rows >= 0 if value is None and linear and packing.filled else value
    if isinstance(value, tuple):
        return tuple(_packed(name, part, packing, linear) for part in value)
    if not isinstance(value, Tensor) or packing.tokens not in value.shape:
        return value
    if name == "attention_mask":
        return gathered(value, packing.rows, 1, fill=0)
    axis = value.ndim - 1 if name == "position_ids" else _axis(value, packing)
    if axis < 1 or value.shape[axis] != packing.tokens:
        raise UnsupportedModelError(
            f"A decoder layer of this model is given {name!r} of the shape {tuple(value.shape)}, and it is not known "
            "what of it belongs to which token, so no token can leave before it: take a method that acts on the KV "
            "cache."
        )
    return gathered(value, packing.rows, axis)


def _axis(value: Tensor, packing: Packing) -> int:
    """The dimension of the tokens: behind the batch, which m-RoPE has its three axes before."""
    axis = 2 if value.ndim == 4 else 1
    return axis if value.ndim > axis and value.shape[axis - 1] in (1, len(packing.rows)) else -1


def _marked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Mark the states that a layer returns with the tokens that they are of."""
    cache = _cache_of(kwargs)
    packing = None if cache is None else getattr(cache, "packing", None)
    if packing is not None:
        output.plphp_packing = packing


def _behind_the_last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Put states back to the places of the whole prompt."""
    cache = _cache_of(kwargs)
    packing = None if cache is None else cache.leave_layers()
    if packing is None:
        return None
    if isinstance(output, tuple):
        return (packing.spread_tokens(output[0]), *output[1:])
    return packing.spread_tokens(output)


def _deepstack(
    original: Callable[[Tensor, Tensor, Tensor], Tensor], states: Tensor, masks: Tensor, embeds: Tensor
) -> Tensor:
    """Add to the states of a layer the features of the vision tokens that it has got."""
    packing: Packing | None = getattr(states, "plphp_packing", None)
    if packing is None:
        return original(states, masks, embeds)
    number = torch.full(masks.shape, 0, device=masks.device)
    number[masks] = torch.arange(int(masks.sum()), device=masks.device)
    there = packing.take(masks, fill=False)
    return original(states, there, embeds[packing.take(number)[there]])
