# SPDX-License-Identifier: Apache-2.0
"""`LayerEntries` as a layer of a transformers cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from plphp.errors import UnsupportedFeatureError
from plphp.pruning.entries import LayerEntries
from plphp.pruning.live_bytes import layer_bytes
from plphp.pruning.packing import Packing
from plphp.pruning.tier_report import LayerBytes


class PrunedLayer(LayerEntries, CacheLayerMixin):
    """Keys and values of one decoder layer, under the names that transformers calls.

    Masks that transformers makes for it have to cover the tail alone: attention sees the prefix without a mask. So
    `get_seq_length` gives the logical length, which positions follow, and `get_mask_sizes` that of the tail.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LayerEntries.__init__(self)

    @property
    def full_nbytes(self) -> int:
        """Bytes that all tokens seen would take in a dynamic cache."""
        if not self.is_initialized:
            return 0
        key_dtype, value_dtype = self.dtypes
        if not values_keep_their_dtype():
            value_dtype = torch.promote_types(self.dtype, value_dtype)
        return self.nbytes_unpruned((key_dtype, value_dtype))

    def begin(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the dtypes, the sizes and the device of the first keys and values."""
        super().begin(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the dtypes, the sizes and the device of the first keys and values."""
        self.begin(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, packing: Packing | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new entries to the tail, see `LayerEntries.append`."""
        return self.append(key_states, value_states, packing)

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask has to cover: the tail alone."""
        return self.length - self.prefix_length + query_length, self.prefix_length

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.forget()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number), as long as they are in the tail."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}.")
        self.remove_last(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, as beam search does."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; the prefix is shared by the copies."""
        if self.batch_size > 0:
            self.select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (numbers, or a bool mask)."""
        self.select_rows(indices)

    def offload(self) -> None:
        """Refused: the cache is not made with offloading."""
        raise UnsupportedFeatureError("A PrunedCache cannot be offloaded to the host.")

    prefetch = offload


@cache
def values_keep_their_dtype() -> bool:
    """Whether a dynamic cache holds values in their own dtype: before 5.24 they are joined to the first keys' dtype."""
    # Tried on a layer and not read off the version: it is the behaviour that the bytes of a full cache depend on.
    layer = DynamicLayer()
    layer.lazy_initialization(torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.bfloat16))
    return layer.values.dtype is torch.bfloat16


def layer_nbytes(layer: Any) -> int:
    """Bytes that a layer of any kind holds."""
    if isinstance(layer, PrunedLayer):
        return layer.nbytes
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(layer))


def held_bytes(number: int, layer: Any) -> LayerBytes:
    """What layer ``number`` of any kind holds, and what a decoding step reads of it."""
    if isinstance(layer, PrunedLayer):
        return layer_bytes(number, layer)
    devices = [str(tensor.device) for tensor in _tensors(layer)]
    total = layer_nbytes(layer)
    return LayerBytes(number, devices[0] if devices else "", other=total, read=total)


def _tensors(layer: Any) -> list[Tensor]:
    """The tensors of a layer of transformers."""
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    for states in ("conv_states", "recurrent_states"):
        tensors += list(getattr(layer, states, {}).values())
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
