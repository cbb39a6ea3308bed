# SPDX-License-Identifier: Apache-2.0
"""Triton kernels over the codes of one tier: logits of its index, attention, and its merge.

Codes become numbers in registers, see `_codes_triton`. Rotated values are mixed as they are, in a half of their own
beside those that are not, and rotated back when all parts are merged. The mean of the keys is one logit for all entries
of a head, and that of the values is added once.

Where entries lie is read from the table of `_choose_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._choose_triton import FIELDS
from ._codes_triton import ROTATED, centroids, logits_of, planes, stepped
from ._triton_shapes import LOG2_E, load_tile

COLUMNS: tl.constexpr = tl.constexpr(32)
"""Columns of a rotation that are read at once."""


@triton.jit
def _of_mean(
    q, means, table, pair, CENTRED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Products of queries [TILE, WIDE] with the mean that was taken off the keys."""
    result = tl.zeros([TILE], tl.float32)
    if CENTRED:
        channel = tl.arange(0, WIDE)
        stored = tl.load(table + pair).to(tl.int64)
        mean = tl.load(means + stored * DIM + channel, mask=channel < DIM, other=0.0).to(tl.float32)
        result += tl.sum(q.to(tl.float32) * mean[None, :], 1)
    return result


@triton.jit
def index_logits(
    query, turned, table, streams, steps, books, means, logits,
    scale, factor, shift, pairs, tier, chunk, longest,
    BOOKS: tl.constexpr, PART: tl.constexpr, PLANES: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    CENTRED: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, ENTRIES: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Logits [pairs, ROWS, longest] of a chunk of the entries of a pair, by what the index says of its keys.

    Program ids are the pair, the chunk and the tile of rows [group x length], which lie behind each other in queries.
    """
    pair, row = tl.program_id(0), tl.program_id(2) * TILE + tl.arange(0, TILE)
    head, exists, channel = pair % KV_HEADS, row < ROWS, tl.arange(0, WIDE)
    slot = pair.to(tl.int64) * ROWS + row
    within = exists[:, None] & (channel < DIM)[None, :]
    q = load_tile(query + slot[:, None] * DIM + channel[None, :], within, IN_FLOAT32)
    t = load_tile(turned + slot[:, None] * DIM + channel[None, :], within, False) if KIND == ROTATED else q
    of_tier = table + (FIELDS + FIELDS * tier) * pairs + pair
    start, group_start = tl.load(of_tier).to(tl.int64), tl.load(of_tier + 3 * pairs).to(tl.int64)
    before = tl.load(of_tier + 2 * pairs)
    from_mean = _of_mean(q, means, table, pair, CENTRED, DIM, WIDE, TILE)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, tl.load(of_tier + pairs))
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        own = logits_of(
            q, t, streams, steps, books, start, group_start, head, entry, inside, factor, shift,
            BOOKS, PART, PLANES, KIND, GROUP, DIM, WIDE, TILE, ENTRIES,
        )  # fmt: skip
        at = logits + slot[:, None] * longest + (before + entry)[None, :]
        tl.store(at, (own + from_mean[:, None]) * scale, mask=exists[:, None] & inside[None, :])


@triton.jit
def attend_tier(
    query, turned, table, chosen, ends,
    key_streams, key_steps, key_books, key_means, value_streams, value_steps, value_books, value_means, partial, lse,
    scale, key_shift, value_shift, pairs, tiers, tier, length, per, most, chunk, split_before, splits,
    KEY_BOOKS: tl.constexpr, KEY_PART: tl.constexpr, KEY_PLANES: tl.constexpr, KEY_KIND: tl.constexpr,
    KEY_GROUP: tl.constexpr, KEY_CENTRED: tl.constexpr,
    VALUE_BOOKS: tl.constexpr, VALUE_PART: tl.constexpr, VALUE_PLANES: tl.constexpr, VALUE_KIND: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_CENTRED: tl.constexpr,
    RECALLS: tl.constexpr, HALVES: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of rows [group x per] of a pair to a chunk of its entries in a tier, or of those chosen.

    Program ids are the unit, ``per`` queries of a pair, the chunk and the tile. ``partial`` is [units, ROWS, splits,
    HALVES, VALUE_DIM]: values as they are, and rotated ones.
    """
    unit, split = tl.program_id(0), tl.program_id(1)
    pair = unit // (length // per)
    head, of_tile = pair % KV_HEADS, tl.program_id(2) * TILE + tl.arange(0, TILE)
    exists, channel = of_tile < ROWS, tl.arange(0, WIDE)
    # Queries are [pairs, group, length, dim].
    slot = (pair.to(tl.int64) * (ROWS // per) + of_tile // per) * length + unit % (length // per) * per + of_tile % per
    within = exists[:, None] & (channel < DIM)[None, :]
    q = load_tile(query + slot[:, None] * DIM + channel[None, :], within, IN_FLOAT32)
    t = load_tile(turned + slot[:, None] * DIM + channel[None, :], within, False) if KEY_KIND == ROTATED else q
    from_mean = _of_mean(q, key_means, table, pair, KEY_CENTRED, DIM, WIDE, TILE)
    of_tier = table + (FIELDS + FIELDS * tier) * pairs + pair
    if RECALLS:
        begin = tl.load(ends + unit * tiers + tier - 1, mask=tier > 0, other=0) + split * chunk
        end = tl.load(ends + unit * tiers + tier)
    else:
        begin, end = split * chunk, tl.load(of_tier + pairs)
    top, total, mixed, mixed_turned = _over_codes(
        q, t, from_mean, key_streams, key_steps, key_books, value_streams, value_steps, value_books,
        chosen + unit.to(tl.int64) * most, of_tier, pairs, head, begin, tl.minimum(begin + chunk, end), exists,
        scale, key_shift, value_shift,
        KEY_BOOKS, KEY_PART, KEY_PLANES, KEY_KIND, KEY_GROUP,
        VALUE_BOOKS, VALUE_PART, VALUE_PLANES, VALUE_KIND, VALUE_GROUP,
        RECALLS, DIM, VALUE_DIM, WIDE, VALUE_WIDE, TILE, ENTRIES,
    )  # fmt: skip
    seen = total > 0  # False for NaN, which stays in what is mixed
    total = tl.where(seen, total, 1.0)
    at = (unit.to(tl.int64) * ROWS + of_tile) * splits + split_before + split
    tl.store(lse + at, tl.where(seen, (top + tl.log2(total)) / LOG2_E, float("-inf")), mask=exists)
    channel = tl.arange(0, VALUE_WIDE)
    mixed = mixed / total[:, None]
    if VALUE_CENTRED:
        of_pair = value_means + tl.load(table + pair).to(tl.int64) * VALUE_DIM
        mixed += tl.load(of_pair + channel, mask=channel < VALUE_DIM, other=0.0).to(tl.float32)[None, :]
    within = exists[:, None] & (channel < VALUE_DIM)[None, :]
    parts_at = partial + at[:, None] * (HALVES * VALUE_DIM) + channel[None, :]
    tl.store(parts_at, mixed, mask=within)
    if HALVES == 2:
        tl.store(parts_at + VALUE_DIM, mixed_turned / total[:, None], mask=within)


@triton.jit
def _over_codes(
    q, turned, from_mean, key_streams, key_steps, key_books, value_streams, value_steps, value_books,
    chosen, of_tier, pairs, head, begin, end, exists, scale, key_shift, value_shift,
    KEY_BOOKS: tl.constexpr, KEY_PART: tl.constexpr, KEY_PLANES: tl.constexpr, KEY_KIND: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    VALUE_BOOKS: tl.constexpr, VALUE_PART: tl.constexpr, VALUE_PLANES: tl.constexpr, VALUE_KIND: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    RECALLS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr, VALUE_WIDE: tl.constexpr,
    TILE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Online softmax over entries ``begin`` to ``end``, of the pair or of those chosen: maxima [TILE], sums [TILE],
    mixed values [TILE, VALUE_WIDE], and mixed rotated values."""
    start, group_start = tl.load(of_tier).to(tl.int64), tl.load(of_tier + 3 * pairs).to(tl.int64)
    before = tl.load(of_tier + 2 * pairs)
    channel = tl.arange(0, VALUE_WIDE)[None, :]
    top, total = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32)
    mixed, mixed_turned = tl.zeros([TILE, VALUE_WIDE], tl.float32), tl.zeros([TILE, VALUE_WIDE], tl.float32)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        inside = entry < end
        if RECALLS:
            entry = tl.load(chosen + entry, mask=inside, other=before) - before
        logits = logits_of(
            q, turned, key_streams, key_steps, key_books, start, group_start, head, entry, inside, 1.0, key_shift,
            KEY_BOOKS, KEY_PART, KEY_PLANES, KEY_KIND, KEY_GROUP, DIM, WIDE, TILE, ENTRIES,
        )  # fmt: skip
        logits = tl.where(inside[None, :] & exists[:, None], (logits + from_mean[:, None]) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight, fade = tl.exp2(logits - base[:, None]), tl.exp2(top - base)
        at, mask = entry[:, None], inside[:, None] & (channel < VALUE_DIM)
        mixed, mixed_turned = mixed * fade[:, None], mixed_turned * fade[:, None]
        if VALUE_BOOKS > 0:
            v = centroids(
                value_streams, value_books, start, at, channel, head, mask, VALUE_BOOKS, VALUE_PART, VALUE_DIM
            )
            mixed += tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        if VALUE_PLANES > 0:
            code = planes(value_streams, start, at, channel, mask, VALUE_BOOKS, VALUE_PLANES, VALUE_DIM) + value_shift
            if VALUE_KIND == ROTATED:
                step = tl.load(value_steps + start + entry, mask=inside, other=0.0).to(tl.float32)
                v = code * step[:, None]
                mixed_turned += tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision="ieee")
            else:
                v = stepped(
                    code, value_steps, start, group_start, at, channel, mask, VALUE_KIND, VALUE_GROUP, VALUE_DIM
                )
                mixed += tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        top = higher
    return top, total, mixed, mixed_turned


@triton.jit
def turn(rows, rotation, out, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Rotate a row [DIM], float32; without the settings and the dtypes that a product of torch's depends on."""
    at, channel = tl.program_id(0).to(tl.int64) * DIM, tl.arange(0, WIDE)
    own = tl.load(rows + at + channel, mask=channel < DIM, other=0.0).to(tl.float32)
    for first in range(0, DIM, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (channel < DIM)[:, None] & (column < DIM)[None, :]
        matrix = tl.load(rotation + channel[:, None] * DIM + column[None, :], mask=mask, other=0.0)
        tl.store(out + at + column, tl.sum(matrix * own[:, None], 0), mask=column < DIM)


@triton.jit
def merge_tiers(
    partial, lse, rest_lse, rest_values, table, rotation, out, out_lse, splits, length, per, pairs,
    HALVES: tl.constexpr, RESTS: tl.constexpr, ROWS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one row [group x per] of a unit by their log-sum-exps, with what stands in for the rest."""
    program = tl.program_id(0).to(tl.int64)
    unit, of_unit = program // ROWS, program % ROWS
    units = length // per
    pair = unit // units
    slot = (pair * (ROWS // per) + of_unit // per) * length + unit % units * per + of_unit % per
    channel = tl.arange(0, VALUE_WIDE)
    wide = channel < VALUE_DIM
    top, total = float("-inf"), 0.0
    mixed, mixed_turned = tl.zeros([VALUE_WIDE], tl.float32), tl.zeros([VALUE_WIDE], tl.float32)
    if RESTS:
        top = tl.where(tl.load(table + 3 * pairs + pair) != 0, tl.load(rest_lse + slot), float("-inf"))
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        value = tl.load(rest_values + tl.load(table + pair).to(tl.int64) * VALUE_DIM + channel, mask=wide, other=0.0)
        mixed += tl.where(total > 0, value.to(tl.float32), 0.0)
    for split in range(splits):
        at = program * splits + split
        own = tl.load(lse + at)
        higher = tl.maximum(top, own)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade, share = tl.exp(top - base), tl.exp(own - base)
        parts_at = partial + at * (HALVES * VALUE_DIM) + channel
        mixed = mixed * fade + tl.load(parts_at, mask=wide, other=0.0) * share
        if HALVES == 2:
            mixed_turned = mixed_turned * fade + tl.load(parts_at + VALUE_DIM, mask=wide, other=0.0) * share
        total = total * fade + share
        top = higher
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    tl.store(out_lse + slot, tl.where(seen, top + tl.log(total), float("-inf")))
    mixed, mixed_turned = mixed / total, mixed_turned / total
    if HALVES == 1:
        tl.store(out + slot * VALUE_DIM + channel, mixed.to(out.dtype.element_ty), mask=wide)
    else:
        for first in range(0, VALUE_DIM, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = wide[:, None] & (column < VALUE_DIM)[None, :]
            matrix = tl.load(rotation + channel[:, None] * VALUE_DIM + column[None, :], mask=mask, other=0.0)
            own = tl.where(channel[:, None] == column[None, :], mixed[:, None], 0.0) + matrix * mixed_turned[:, None]
            tl.store(out + slot * VALUE_DIM + column, tl.sum(own, 0).to(out.dtype.element_ty), mask=column < VALUE_DIM)
