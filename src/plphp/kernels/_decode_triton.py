# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `plphp.kernels.decode`: split-K attention over a packed prefix and a dense tail, and its merge.

The query heads of a KV head are rows of one tile, so that each key and value is read once per KV head. Every program
attends to a chunk of the entries of one row and KV head, in base 2, and writes its output with a natural-log LSE; the
programs of one head are then merged. Rows and heads with fewer entries than others have programs that end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_shapes import LOG2_E, chunk_of, load_tile, multiplies_bits, on_its_device, tile_shape, wide_of
from .packed import PackedKV


def attend(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """Attend with query [batch, q_heads, length, dim]; see `plphp.kernels.decode_attention`.

    Queries and all keys have one dtype, and all values one, which may be another. ``bias`` is additive, float32
    [batch or 1, q_heads or 1, length, tail], in the place of the causal mask.
    """
    return attend_parts(query, prefix, tail_keys, tail_values, bias, scaling)[0]


@on_its_device
def attend_parts(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """As `attend`; beside the output [batch, length, q_heads, dim] the log-sum-exps of the logits, float32 [batch,
    q_heads, length]."""
    batch, q_heads, length, dim = query.shape
    kv_heads, tail, value_dim = tail_keys.shape[1], tail_keys.shape[2], tail_values.shape[3]
    group = q_heads // kv_heads
    rows = group * length
    wide, value_wide = wide_of(dim), wide_of(value_dim)
    widest_number = max(query.element_size(), tail_values.element_size())
    tile, entries = tile_shape(rows, max(wide, value_wide), widest_number)
    chunk = chunk_of(batch * kv_heads, max(map(max, prefix.counts)) + tail, query.device)
    early = triton.cdiv(max(map(max, prefix.counts)), chunk)
    splits = early + triton.cdiv(tail, chunk)
    starts, counts = prefix.index
    partial = torch.empty(batch, kv_heads, rows, splits, value_dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, kv_heads, rows, splits, dtype=torch.float32, device=query.device)
    shown = tail_keys if bias is None else bias.expand(batch, q_heads, length, tail)
    _attend_chunk[(batch * kv_heads, splits, triton.cdiv(rows, tile))](
        query, prefix.keys, prefix.values, tail_keys, tail_values, starts, counts, shown, partial, lse,
        scaling * LOG2_E.value, tail, length, early, chunk,
        *query.stride(), *prefix.keys.stride(), *prefix.values.stride(), *tail_keys.stride(), *tail_values.stride(),
        *shown.stride(),
        KV_HEADS=kv_heads, ROWS=rows, DIM=dim, VALUE_DIM=value_dim, BIASED=bias is not None,
        IN_FLOAT32=multiplies_bits(query, tail_values),
        TILE=tile, ENTRIES=entries, WIDE=wide, VALUE_WIDE=value_wide,
    )  # fmt: skip
    out = torch.empty(batch, length, q_heads, value_dim, dtype=query.dtype, device=query.device)
    out_lse = torch.empty(batch, q_heads, length, dtype=torch.float32, device=query.device)
    _merge[(batch * kv_heads * rows,)](
        partial, lse, out, out_lse, splits, length,
        Q_HEADS=q_heads, ROWS=rows, VALUE_DIM=value_dim, VALUE_WIDE=value_wide,
    )  # fmt: skip
    return out, out_lse


@triton.jit
def _attend_chunk(
    query, keys, values, tail_keys, tail_values, starts, counts, bias, partial, lse,
    scale, tail, length, early, chunk,
    query_batch, query_head, query_place, query_dim, key_entry, key_dim, value_entry, value_dim,
    tail_key_batch, tail_key_head, tail_key_entry, tail_key_dim,
    tail_value_batch, tail_value_head, tail_value_entry, tail_value_dim,
    bias_batch, bias_head, bias_place, bias_entry,
    KV_HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BIASED: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    TILE: tl.constexpr, ENTRIES: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of rows [group x length] of one KV head to one chunk of its entries.

    Program ids are the pair of a row of the batch and a KV head, the chunk, and the tile.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(1)
    row, head = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    of_tile = tl.program_id(2) * TILE + tl.arange(0, TILE)
    exists = of_tile < ROWS
    q_head = head * (ROWS // length) + of_tile // length
    place = of_tile % length
    dims, value_dims = tl.arange(0, WIDE), tl.arange(0, VALUE_WIDE)
    at = query + row * query_batch + q_head[:, None] * query_head + place[:, None] * query_place
    q = load_tile(at + dims[None, :] * query_dim, exists[:, None] & (dims < DIM)[None, :], IN_FLOAT32)

    # The first chunks are those of the prefix, and a chunk is never of both.
    in_tail = split >= early
    if in_tail:
        begin = (split - early) * chunk
        end = tl.minimum(begin + chunk, tail)
        keys_at = tail_keys + row * tail_key_batch + head * tail_key_head
        values_at = tail_values + row * tail_value_batch + head * tail_value_head
        key_step, key_dim_step = tail_key_entry, tail_key_dim
        value_step, value_dim_step = tail_value_entry, tail_value_dim
    else:
        begin = split * chunk
        end = tl.minimum(begin + chunk, tl.load(counts + pair)).to(tl.int32)
        start = tl.load(starts + pair)
        keys_at, values_at = keys + start * key_entry, values + start * value_entry
        key_step, key_dim_step, value_step, value_dim_step = key_entry, key_dim, value_entry, value_dim
    top, total, mixed = _over_entries(
        q, keys_at + dims[:, None] * key_dim_step, key_step,
        values_at + value_dims[None, :] * value_dim_step, value_step, begin, end, scale, exists, in_tail,
        bias + row * bias_batch + q_head[:, None] * bias_head + place[:, None] * bias_place, bias_entry,
        tail - length + place, DIM, VALUE_DIM, BIASED, IN_FLOAT32, TILE, ENTRIES, WIDE, VALUE_WIDE,
    )  # fmt: skip

    # A chunk of which a row sees nothing has no LSE; a total of NaN is no number above 0 either, and stays in `mixed`.
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    slot = (pair.to(tl.int64) * ROWS + of_tile) * splits + split
    tl.store(lse + slot, tl.where(seen, (top + tl.log2(total)) / LOG2_E, float("-inf")), mask=exists)
    at = partial + slot[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(at, mixed / total[:, None], mask=exists[:, None] & (value_dims < VALUE_DIM)[None, :])


@triton.jit
def _over_entries(
    q, keys_at, key_step, values_at, value_step, begin, end, scale, exists, in_tail, bias_at, bias_entry, upto,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BIASED: tl.constexpr, IN_FLOAT32: tl.constexpr,
    TILE: tl.constexpr, ENTRIES: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
):  # fmt: skip
    """Online softmax over entries ``begin`` to ``end``: maxima [TILE], sums [TILE] and mixed values [TILE, VALUE_WIDE].

    A row sees the tail as far as its bias says, or without one up to the entry ``upto``.
    """
    wide, value_wide = tl.arange(0, WIDE) < DIM, tl.arange(0, VALUE_WIDE) < VALUE_DIM
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, VALUE_WIDE], tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        far = entry.to(tl.int64)
        k = load_tile(keys_at + far[None, :] * key_step, inside[None, :] & wide[:, None], IN_FLOAT32)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        seen = inside[None, :] & exists[:, None]
        if in_tail:
            if BIASED:
                shown = tl.load(bias_at + far[None, :] * bias_entry, mask=seen, other=0.0)
                # A mask's lowest number would overflow; one row may be masked altogether, so no -inf.
                logits += tl.maximum(shown, -1e30) * LOG2_E
            else:
                seen = seen & (entry[None, :] <= upto[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(logits - base[:, None])
        fade = tl.exp2(top - base)
        v = load_tile(values_at + far[:, None] * value_step, inside[:, None] & value_wide[None, :], IN_FLOAT32)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        top = higher
    return top, total, mixed


@triton.jit
def _merge(
    partial, lse, out, out_lse, splits, length,
    Q_HEADS: tl.constexpr, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDE: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one row [group x length] of one KV head by their log-sum-exps."""
    program = tl.program_id(0).to(tl.int64)
    pair, of_pair = program // ROWS, program % ROWS
    kv_heads = Q_HEADS // (ROWS // length)
    dims = tl.arange(0, VALUE_WIDE)
    wide = dims < VALUE_DIM
    top, total = float("-inf"), 0.0
    mixed = tl.zeros([VALUE_WIDE], tl.float32)
    for split in range(splits):
        own = tl.load(lse + program * splits + split)
        higher = tl.maximum(top, own)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade, share = tl.exp(top - base), tl.exp(own - base)
        part = tl.load(partial + (program * splits + split) * VALUE_DIM + dims, mask=wide, other=0.0)
        mixed = mixed * fade + part * share
        total = total * fade + share
        top = higher
    row, q_head = pair // kv_heads, (pair % kv_heads) * (ROWS // length) + of_pair // length
    at = ((row * length + of_pair % length) * Q_HEADS + q_head) * VALUE_DIM
    tl.store(out + at + dims, (mixed / total).to(out.dtype.element_ty), mask=wide)
    # Rows [group x length] of a pair lie in the order of query heads and queries.
    tl.store(out_lse + program, top + tl.log(tl.where(total == 0.0, 1.0, total)))
