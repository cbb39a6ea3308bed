# SPDX-License-Identifier: Apache-2.0
"""Attention over entries that are held in few bits, on CUDA: what is launched, kernels of `_tier_triton`.

Every tier is a launch, and the parts are merged in one more. With recall, a launch for each tier gives the logits of
its index, and one more chooses: nothing that is on the device is looked at from the host, and all shapes follow from
the counts of the block, so that a step can be captured in a CUDA graph once it has run.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._choose_triton import choose
from ._codes_triton import CHANNEL, ROTATED, TOKEN
from ._tier_triton import attend_tier, index_logits, merge_tiers, turn
from ._triton_shapes import LOG2_E, chunk_of, multiplies_bits, on_its_device, tile_shape, wide_of
from .books import PART, Books
from .centred import Centred
from .codecs import Affine, Codec, Codes, groups_of
from .coded import CodedKV, Tier
from .hadamard import hadamard

MAX_LOGITS = 2**24
"""Logits of the index that are held at once; long queries are cut so that they stay below."""
BLOCK = 4096
"""Most masses that a program looks at at once."""
_PLAN = "_triton_plan"


class _Side(NamedTuple):
    """The keys, or the values, of a tier as kernels take them.

    Parameters
    ----------
    tensors : tuple
        Streams, steps, codebooks and means.
    constants : tuple of int
        Codebooks, channels of their parts, bit planes, what these are, entries or channels that share steps, and
        whether there is a mean.
    shift : float
        Added to codes of bit planes.
    """

    tensors: tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Tensor]
    constants: tuple[int, ...]
    shift: float


class _Plan(NamedTuple):
    """What every call over a block has in common.

    Parameters
    ----------
    table : Tensor
        int32 [fields, pairs], see `_choose_triton`.
    sides : tuple of tuple of _Side
        Keys and values of each tier.
    of_index : tuple of tuple of _Side and float
        What the index says of the keys of each tier, and the factor on its codes.
    counts : tuple of int
        Most entries of a pair in each tier.
    longest, most : int
        Most entries of a pair in all tiers, and most that a query reads.
    """

    table: Tensor
    sides: tuple[tuple[_Side, _Side], ...]
    of_index: tuple[tuple[_Side, float], ...]
    counts: tuple[int, ...]
    longest: int
    most: int


class _Heads(NamedTuple):
    """Queries [batch, q_heads, length, dim], as they are and rotated in float32, and what all kernels that take them
    share."""

    query: Tensor
    turned: Tensor
    length: int
    group: int
    value_dim: int
    constants: dict[str, int]


@on_its_device
def attend(query: Tensor, coded: CodedKV, scaling: float) -> tuple[Tensor, Tensor]:
    """Softmax attention over coded entries; all as in `plphp.kernels.coded_attention.attend_codes`.

    Parameters
    ----------
    query : Tensor
        float32, bfloat16 or float16 [batch, q_heads, query, dim].
    coded : CodedKV
        Of ``batch`` rows.
    scaling : float
        Factor on the logits.

    Returns
    -------
    output : Tensor
        [batch, q_heads, query, value_dim], contiguous, in the dtype of the query.
    lse : Tensor
        float32 [batch, q_heads, query].
    """
    plan = coded.__dict__.get(_PLAN)
    if plan is None:
        plan = coded.__dict__[_PLAN] = _plan(coded)
    length = query.shape[2]
    step = max(1, MAX_LOGITS // max(1, query.shape[0] * query.shape[1] * plan.longest)) if coded.recalls else length
    parts = [_attend(part, coded, plan, scaling) for part in query.split(step, 2)]
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def _attend(query: Tensor, coded: CodedKV, plan: _Plan, scaling: float) -> tuple[Tensor, Tensor]:
    heads = _heads(query.contiguous(), coded, plan)
    chosen = _chosen(heads, coded, plan, scaling) if coded.recalls else None
    # Queries of a pair that choose for themselves are units of their own.
    per = heads.length if chosen is None else 1
    pairs, rows = coded.batch * coded.kv_heads, heads.group * per
    units = pairs * (heads.length // per)
    # Kernels that read everything ask neither for places nor for the rest.
    places, ends, rest_lse = (plan.table,) * 3 if chosen is None else chosen
    chunk = chunk_of(units, plan.longest if chosen is None else plan.most, query.device)
    splits = [triton.cdiv(count if chosen is None else min(count, plan.most), chunk) for count in plan.counts]
    turned = any(side.constants[3] == ROTATED.value for _, side in plan.sides)
    halves = 2 if turned else 1
    wide = wide_of(heads.value_dim)
    tile, entries = tile_shape(rows, max(heads.constants["WIDE"], wide), query.element_size())
    partial = query.new_empty(units, rows, sum(splits), halves, heads.value_dim, dtype=torch.float32)
    lse = query.new_empty(units, rows, sum(splits), dtype=torch.float32)
    shapes = {"ROWS": rows, "HALVES": halves, "VALUE_DIM": heads.value_dim, "VALUE_WIDE": wide}
    for tier, (keys, values) in enumerate(plan.sides):
        if splits[tier]:
            attend_tier[(units, splits[tier], triton.cdiv(rows, tile))](
                heads.query, heads.turned, plan.table, places, ends, *keys.tensors, *values.tensors, partial, lse,
                scaling * LOG2_E.value, keys.shift, values.shift,
                pairs, len(splits), tier, heads.length, per, plan.most, chunk, sum(splits[:tier]), sum(splits),
                **_named(keys, "KEY_"), **_named(values, "VALUE_"), **heads.constants, **shapes,
                RECALLS=chosen is not None, TILE=tile, ENTRIES=entries,
            )  # fmt: skip
    out = query.new_empty(*query.shape[:3], heads.value_dim)
    out_lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    rests = chosen is not None and coded.rest_values is not None
    rotation = hadamard(heads.value_dim, torch.float32, query.device) if turned else partial
    merge_tiers[(units * rows,)](
        partial, lse, rest_lse, coded.rest_values if rests else partial, plan.table, rotation, out, out_lse,
        sum(splits), heads.length, per, pairs, RESTS=rests, **shapes,
    )  # fmt: skip
    return out, out_lse


def _heads(query: Tensor, coded: CodedKV, plan: _Plan) -> _Heads:
    q_heads, length, dim = query.shape[1:]
    turned = query
    if any(side.constants[3] == ROTATED.value for side, _ in plan.sides):
        turned = torch.empty_like(query, dtype=torch.float32)
        rotation = hadamard(dim, torch.float32, query.device)
        turn[(query.numel() // dim,)](query, rotation, turned, DIM=dim, WIDE=wide_of(dim))
    constants = {"KV_HEADS": coded.kv_heads, "DIM": dim, "WIDE": wide_of(dim), "IN_FLOAT32": multiplies_bits(query)}
    return _Heads(query, turned, length, q_heads // coded.kv_heads, coded.value_dim, constants)


def _chosen(heads: _Heads, coded: CodedKV, plan: _Plan, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """What queries read, places int32 [pairs, length, most] and numbers at the ends of the tiers, int32 [pairs, length,
    tiers]; and the log-sum-exps of the rest, float32 [pairs, group, length]."""
    query, rests = heads.query, coded.rest_values is not None
    pairs, rows = coded.batch * coded.kv_heads, heads.group * heads.length
    tile, entries = tile_shape(rows, heads.constants["WIDE"], query.element_size())
    chunk = chunk_of(pairs, plan.longest, query.device)
    logits = query.new_full((pairs, heads.group, heads.length, max(1, plan.longest)), -torch.inf, dtype=torch.float32)
    for tier, (side, factor) in enumerate(plan.of_index):
        splits = triton.cdiv(plan.counts[tier], chunk)
        if splits:
            index_logits[(pairs, splits, triton.cdiv(rows, tile))](
                query, heads.turned, plan.table, *side.tensors, logits, scaling, factor, side.shift,
                pairs, tier, chunk, logits.shape[3],
                **_named(side, ""), **heads.constants, ROWS=rows, TILE=tile, ENTRIES=entries,
            )  # fmt: skip
    mass = logits.softmax(-1).mean(1)
    places = query.new_empty(pairs, heads.length, max(1, plan.most), dtype=torch.int32)
    ends = query.new_empty(pairs, heads.length, len(plan.counts), dtype=torch.int32)
    choose[(pairs * heads.length,)](
        mass, plan.table, places, ends, logits, pairs, len(plan.counts), logits.shape[3], places.shape[2], heads.length,
        GROUP=heads.group, RESTS=rests, BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[3])), num_warps=8,
    )  # fmt: skip
    return places, ends, logits.logsumexp(-1) if rests else logits


def _named(side: _Side, prefix: str) -> dict[str, int]:
    names = ("BOOKS", "PART", "PLANES", "KIND", "GROUP", "CENTRED")
    return {prefix + name: value for name, value in zip(names, side.constants, strict=True)}


def _plan(coded: CodedKV) -> _Plan:
    """Work out where everything lies; a block is immutable."""
    stored = [row * coded.kv_heads + head for row in coded.rows for head in range(coded.kv_heads)]
    held = [count for row in coded.rows for count in coded.held[row]]
    readings = [coded.reading[row] for row in coded.rows for _ in range(coded.kv_heads)]
    wanted = [reading.entries(count) for reading, count in zip(readings, held, strict=True)]
    fields = [stored, held, wanted, [int(reading.stands_in) for reading in readings]]
    before = [0] * len(held)
    for tier in coded.tiers:
        fields += [tier.pair_starts, tier.pair_counts, before, _first_groups(tier)]
        before = [own + count for own, count in zip(before, tier.pair_counts, strict=True)]
    table = torch.tensor(fields, dtype=torch.int32).to(coded.tiers[0].device)
    of_keys, of_values = (None, None) if coded.books is None else (coded.books.keys, coded.books.values)
    sides, index = [], []
    for tier in coded.tiers:
        keys = _side(tier.rung.keys, tier.keys, coded.key_means, of_keys)
        sides.append((keys, _side(tier.rung.values, tier.values, coded.value_means, of_values)))
        index.append(_index_side(keys))
    counts = tuple(max(tier.pair_counts) for tier in coded.tiers)
    return _Plan(table, tuple(sides), tuple(index), counts, max(held), max(wanted))


def _first_groups(tier: Tier) -> list[int]:
    """The first group of each pair."""
    size = tier.rung.group
    if not size:
        return [0] * len(tier.pair_counts)
    counts = tuple(count for row in tier.counts for count in row)
    first = list(accumulate(groups_of(counts, size), initial=0))
    return [first[row * tier.kv_heads + head] for row in tier.rows for head in range(tier.kv_heads)]


def _side(codec: Codec, codes: Codes, means: Tensor | None, books: Books | None) -> _Side:
    streams = tuple(stream.contiguous() for stream in codes.streams)
    # Kernels do not read what a codec does not have.
    nothing = streams[0]
    if isinstance(codec, Affine):
        shared = codes.scales if codes.groups is None else codes.groups
        assert shared is not None
        group = codec.group if codec.axis == "channel" else codec.channels(PART * nothing.shape[1])
        kind = CHANNEL.value if codec.axis == "channel" else TOKEN.value
        return _Side((streams, shared.contiguous(), (nothing,), nothing), (0, PART, codec.width, kind, group, 0), 0.0)
    assert isinstance(codec, Centred)
    assert means is not None
    own: Any = tuple(getattr(books, name).contiguous() for name in codec.books)
    part = own[0].shape[3] if own else PART
    steps = nothing if codes.scales is None else codes.scales.contiguous()
    shift = 0.5 - 2 ** (codec.width - 1) if codec.width else 0.0
    kind = ROTATED.value if codec.width else 0
    constants = (len(own), part, codec.width, kind, 0, 1)
    return _Side((streams, steps, own or (nothing,), means.contiguous()), constants, shift)


def _index_side(keys: _Side) -> tuple[_Side, float]:
    """What the first stream of keys says of them, and the factor on its codes; see `Codec.index`."""
    books, part, planes, kind, group, centred = keys.constants
    if books:
        return keys._replace(constants=(1, part, 0, 0, 0, centred), shift=0.0), 1.0
    half = 2.0 ** (planes - 1)
    shift = -half / 2 if kind == ROTATED.value else (half - 1) / 2
    return keys._replace(constants=(0, part, 1, kind, group, centred), shift=shift), half
