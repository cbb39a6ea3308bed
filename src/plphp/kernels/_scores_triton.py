# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `plphp.kernels.scores`: the keys are read for the softmax's sums, then for its weights.

No logits are stored: they would take more memory than the keys. The query rows of a KV head are tiles as in
`_decode_triton`, and every tile reads the keys for the sums. A program works in base 2, and stores a natural-log LSE.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_shapes import LOG2_E, chunk_of, load_tile, multiplies_bits, on_its_device, tile_shape, wide_of
from .packed import PackedKV


@on_its_device
def attention_mass(
    query: Tensor,
    weight: Tensor,
    position: Tensor,
    keys: Tensor,
    valid: Tensor,
    prefix: PackedKV | None,
    scaling: float,
) -> Tensor:
    """Weighted mean of the queries' softmax mass, float32 [batch, q_heads, seq]; see `plphp.kernels.window_scores`."""
    batch, q_heads, window, dim = query.shape
    kv_heads, seq = keys.shape[1:3]
    group = q_heads // kv_heads
    rows, longest = group * window, 0 if prefix is None else max(map(max, prefix.counts))
    wide = wide_of(dim)
    tile, entries = tile_shape(rows, wide, query.element_size())
    chunk = chunk_of(batch * kv_heads, longest + seq, query.device)
    early = triton.cdiv(longest, chunk)
    splits = early + triton.cdiv(seq, chunk)
    valid, position, weight = valid.contiguous(), position.contiguous(), weight.float().contiguous()
    # Without a prefix no chunk is early, and these three are not read.
    starts, counts, old = (position, position, keys[0, 0]) if prefix is None else (*prefix.index, prefix.keys)
    shared = {"KV_HEADS": kv_heads, "DIM": dim, "WIDE": wide, "IN_FLOAT32": multiplies_bits(query)}

    parts = torch.empty(batch, kv_heads, rows, splits, dtype=torch.float32, device=query.device)
    _window_lse[(batch * kv_heads, splits, triton.cdiv(rows, tile))](
        query, old, keys, starts, counts, valid, position, parts,
        scaling * LOG2_E.value, seq, window, early, chunk,
        *query.stride(), *old.stride(), *keys.stride(),
        ROWS=rows, TILE=tile, ENTRIES=entries, **shared,
    )  # fmt: skip
    lse = parts.logsumexp(-1)
    mass = torch.empty(batch, q_heads, seq, dtype=torch.float32, device=query.device)
    tile, entries = tile_shape(window, wide, query.element_size())
    _window_mass[(batch * kv_heads, triton.cdiv(seq, entries))](
        query, keys, weight, valid, position, lse, mass, scaling * LOG2_E.value, seq, window,
        *query.stride(), *keys.stride(),
        GROUP=group, TILE=tile, ENTRIES=entries, **shared,
    )  # fmt: skip
    return mass


@triton.jit
def _window_lse(
    query, old, keys, starts, counts, valid, position, parts,
    scale, seq, window, early, chunk,
    query_batch, query_head, query_place, query_dim, old_entry, old_dim, key_batch, key_head, key_entry, key_dim,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, IN_FLOAT32: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of rows [group x window] of one KV head over one chunk of its entries, old or new."""
    pair, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    row, head = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    of_tile = tl.program_id(2) * TILE + tl.arange(0, TILE)
    exists = of_tile < ROWS
    place = of_tile % window
    q_head = head * (ROWS // window) + of_tile // window
    dims = tl.arange(0, WIDE)
    wide = dims < DIM
    at = query + row * query_batch + q_head[:, None] * query_head + place[:, None] * query_place
    q = load_tile(at + dims[None, :] * query_dim, exists[:, None] & wide[None, :], IN_FLOAT32)
    upto = tl.load(position + place)

    is_new = split >= early
    if is_new:
        begin = (split - early) * chunk
        end = tl.minimum(begin + chunk, seq)
        keys_at = keys + row * key_batch + head * key_head
        step, dim_step = key_entry, key_dim
    else:
        begin = split * chunk
        end = tl.minimum(begin + chunk, tl.load(counts + pair)).to(tl.int32)
        keys_at = old + tl.load(starts + pair) * old_entry
        step, dim_step = old_entry, old_dim

    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        far = entry.to(tl.int64)
        tile_at = keys_at + far[None, :] * step + dims[:, None] * dim_step
        k = load_tile(tile_at, inside[None, :] & wide[:, None], IN_FLOAT32)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        seen = inside[None, :] & exists[:, None]
        if is_new:
            is_valid = tl.load(valid + row * seq + far, mask=inside, other=0) != 0
            seen = seen & is_valid[None, :] & (far[None, :] <= upto[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = higher
    slot = (pair.to(tl.int64) * ROWS + of_tile) * splits + split
    # A sum of NaN is not 0, and stays what it is.
    nothing = total == 0
    lse = (top + tl.log2(tl.where(nothing, 1.0, total))) / LOG2_E
    tl.store(parts + slot, tl.where(nothing, float("-inf"), lse), mask=exists)


@triton.jit
def _window_mass(
    query, keys, weight, valid, position, lse, mass, scale, seq, window,
    query_batch, query_head, query_place, query_dim, key_batch, key_head, key_entry, key_dim,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, IN_FLOAT32: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Mass that every query head of one KV head gives to some new entries, over the whole window."""
    pair = tl.program_id(0)
    row, head = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < seq
    far = entry.to(tl.int64)
    dims = tl.arange(0, WIDE)
    wide = dims < DIM
    at = keys + row * key_batch + head * key_head + far[None, :] * key_entry + dims[:, None] * key_dim
    k = load_tile(at, inside[None, :] & wide[:, None], IN_FLOAT32)
    is_valid = tl.load(valid + row * seq + far, mask=inside, other=0) != 0
    for of_group in range(GROUP):
        q_head = head * GROUP + of_group
        summed = tl.zeros([ENTRIES], tl.float32)
        for first in range(0, window, TILE):
            place = first + tl.arange(0, TILE)
            exists = place < window
            share = tl.load(weight + row * window + place, mask=exists, other=0.0)
            rows_at = query + row * query_batch + q_head * query_head + place[:, None] * query_place
            q = load_tile(rows_at + dims[None, :] * query_dim, exists[:, None] & wide[None, :], IN_FLOAT32)
            logits = tl.dot(q, k, input_precision="ieee") * scale
            upto = tl.load(position + place, mask=exists, other=-1)
            of_row = tl.load(lse + (row * KV_HEADS * GROUP + q_head) * window + place, mask=exists, other=0.0)
            # A query that does not count may be NaN.
            seen = is_valid[None, :] & (far[None, :] <= upto[:, None]) & (share > 0)[:, None]
            summed += tl.sum(tl.where(seen, tl.exp2(logits - of_row[:, None] * LOG2_E) * share[:, None], 0.0), 0)
        tl.store(mass + (row * KV_HEADS * GROUP + q_head) * seq + far, summed, mask=inside)
