# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of `plphp.kernels.compact`: keys and values in one pass that does not read what is evicted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_shapes import on_its_device, tile_shape, wide_of


@on_its_device
def gather(keys: Tensor, values: Tensor, keep: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Copy what is kept of keys and values [batch, kv_heads, seq, dim] to [total, dim] each.

    ``keep`` is bool [batch, kv_heads, seq] on the device of the keys, with ``total`` entries that are True.
    """
    _, kv_heads, seq, dim = keys.shape
    value_dim = values.shape[3]
    marked = keep.contiguous()
    # Up to and with each entry, how many are kept: a kept entry's place in the result, plus 1. So the programs need not
    # know of each other.
    counted = marked.flatten().cumsum(0, dtype=torch.int64)
    new_keys, new_values = keys.new_empty(total, dim), values.new_empty(total, value_dim)
    wide, value_wide = wide_of(dim), wide_of(value_dim)
    _, entries = tile_shape(1, max(wide, value_wide), max(keys.element_size(), values.element_size()))
    _gather[(keep.shape[0] * kv_heads, triton.cdiv(seq, entries))](
        keys, values, marked, counted, new_keys, new_values, seq,
        *keys.stride(), *values.stride(),
        KV_HEADS=kv_heads, DIM=dim, VALUE_DIM=value_dim, ENTRIES=entries, WIDE=wide, VALUE_WIDE=value_wide,
    )  # fmt: skip
    return new_keys, new_values


@triton.jit
def _gather(
    keys, values, keep, counted, new_keys, new_values, seq,
    key_batch, key_head, key_entry, key_dim, value_batch, value_head, value_entry, value_dim,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ENTRIES: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
):  # fmt: skip
    """Copy what is kept of some entries of a row and KV head: program ids are that pair and the block of entries."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // KV_HEADS, pair % KV_HEADS
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES).to(tl.int64)
    inside = entry < seq
    kept = (tl.load(keep + pair * seq + entry, mask=inside, other=0) != 0) & inside
    place = tl.load(counted + pair * seq + entry, mask=kept, other=1) - 1
    dims, value_dims = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE)
    shown = kept[:, None] & (dims < DIM)[None, :]
    at = keys + row * key_batch + head * key_head + entry[:, None] * key_entry + dims[None, :] * key_dim
    tl.store(new_keys + place[:, None] * DIM + dims[None, :], tl.load(at, mask=shown, other=0.0), mask=shown)
    shown = kept[:, None] & (value_dims < VALUE_DIM)[None, :]
    at = values + row * value_batch + head * value_head + entry[:, None] * value_entry + value_dims[None, :] * value_dim
    tl.store(
        new_values + place[:, None] * VALUE_DIM + value_dims[None, :], tl.load(at, mask=shown, other=0.0), mask=shown
    )
