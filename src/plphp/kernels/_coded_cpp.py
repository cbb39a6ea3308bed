# SPDX-License-Identifier: Apache-2.0
"""Calls cpp/coded.cpp: attention of a few query rows over entries that are held in few bits, on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from plphp.errors import CacheMemoryError

from . import choice
from .books import Books
from .centred import Centred
from .codecs import Affine, Codec, Codes, groups_of
from .coded import CodedKV, Tier
from .cpp_library import library

KERNELS = {torch.float32: "attend_codes_float32", torch.bfloat16: "attend_codes_bfloat16"}
"""Functions of the library, by the dtype of queries."""
BOOKS = ("fine", "residual", "coarse")
"""Codebooks in the order of cpp/coded_call.h."""
CENTRED, CHANNEL, TOKEN = range(3)
"""Kinds of codecs, as cpp/coded_call.h has them."""
STREAMS, MOST_TIERS = 8, 16
"""Most streams of a codec, and most tiers."""
MOST_LANES = 16
"""Most query heads of a KV head that choose together what they read."""
LONG = 32
"""Queries up to which the kernel is faster than torch, which decodes everything once."""
_PLAN = "_cpp_plan"
_STRIDES = ctypes.c_int64 * 3


class _Side(ctypes.Structure):
    """The struct ``Side`` of cpp/coded_call.h: the same fields in the same order; so are those below."""

    _fields_ = (
        ("streams", ctypes.c_void_p * STREAMS),
        ("scales", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "books", "planes")),
        ("book", ctypes.c_int64 * len(BOOKS)),
        ("group", ctypes.c_int64),
    )


class _Tier(ctypes.Structure):
    _fields_ = (
        ("keys", _Side),
        ("values", _Side),
        *((name, ctypes.c_void_p) for name in ("starts", "counts", "group_starts")),
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "out", "lse", "more", "more_lse", "tiers", "key_means", "value_means", "rest_values")
        ),
        *((name, ctypes.c_void_p * len(BOOKS)) for name in ("key_books", "value_books")),
        *((name, ctypes.c_void_p) for name in ("pairs", "reads", "rests")),
        *((name, ctypes.c_int64) for name in ("tier_count", "batch", "kv_heads", "group", "length", "dim")),
        ("value_dim", ctypes.c_int64),
        *((name, _STRIDES) for name in ("query_strides", "more_strides")),
        ("threads", ctypes.c_int64),
        ("scaling", ctypes.c_double),
    )


class _Plan(NamedTuple):
    """What every call over a block has in common.

    Parameters
    ----------
    call : _Call
        Without what belongs to the query.
    value_dim : int
        Channels of a value.
    alive : tuple
        What the addresses in ``call`` belong to.
    """

    call: _Call
    value_dim: int
    alive: tuple[object, ...]


def unsupported(query: Tensor, coded: CodedKV) -> str | None:
    """Say why the kernel cannot attend, see `plphp.kernels.coded_attention.attend_codes`; None where it can."""
    reason = choice.unsupported_by_cpp(query)
    if reason is not None:
        return reason
    if any(isinstance(t.rung.keys, Affine) and t.rung.keys.axis == "token" for t in coded.tiers):
        return "it knows no keys with steps per token"
    if query.shape[2] > LONG:
        return f"there are {query.shape[2]} queries, and it is faster than torch up to {LONG}"
    if coded.recalls and query.shape[1] // coded.kv_heads > MOST_LANES:
        return f"more than {MOST_LANES} query heads choose together what they read"
    return None


def attend(
    query: Tensor, coded: CodedKV, scaling: float, more: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over coded entries; all as in `plphp.kernels.coded_attention.attend_codes`.

    Parameters
    ----------
    query : Tensor
        float32 or bfloat16 [batch, q_heads, query, dim].
    coded : CodedKV
        Of ``batch`` rows.
    scaling : float
        Factor on the logits.
    more : tuple of Tensor, optional
        The output, in the dtype of the query, and the log-sum-exps, float32, of attention over more keys.

    Returns
    -------
    output : Tensor
        [batch, q_heads, query, value_dim], contiguous, in the dtype of the query.
    lse : Tensor
        float32 [batch, q_heads, query].

    Raises
    ------
    CacheMemoryError
        If there is no memory for tables and logits.
    """
    plan = coded.__dict__.get(_PLAN)
    if plan is None:
        plan = coded.__dict__[_PLAN] = _plan(coded)
    batch, q_heads, length, dim = query.shape
    out = query.new_empty(batch, q_heads, length, plan.value_dim)
    lse = query.new_empty(batch, q_heads, length, dtype=torch.float32)
    call = _Call.from_buffer_copy(plan.call)
    call.query, call.out, call.lse = query.data_ptr(), out.data_ptr(), lse.data_ptr()
    call.group, call.length, call.dim = q_heads // coded.kv_heads, length, dim
    call.query_strides = _STRIDES(*query.stride()[:3])
    if more is not None:
        # Both have names until the call is done: the struct holds addresses, and no references.
        output, own_lse = more[0], more[1].contiguous()
        call.more, call.more_lse = output.data_ptr(), own_lse.data_ptr()
        call.more_strides = _STRIDES(*output.stride()[:3])
    call.threads, call.scaling = torch.get_num_threads(), scaling
    if getattr(library("coded"), KERNELS[query.dtype])(ctypes.byref(call)):
        raise CacheMemoryError(f"There is no memory for attention over {sum(map(sum, coded.held))} coded tokens.")
    return out, lse


def _plan(coded: CodedKV) -> _Plan:
    """Work out where everything lies; a block is immutable."""
    alive: list[object] = []
    tiers = (_Tier * len(coded.tiers))(*(_tier(tier, alive) for tier in coded.tiers))
    pairs = [row * coded.kv_heads + head for row in coded.rows for head in range(coded.kv_heads)]
    readings = [coded.reading[row] for row in coded.rows]
    reads = [
        reading.entries(count) if reading.share < 1 else -1
        for row, reading in zip(coded.rows, readings, strict=True)
        for count in coded.held[row]
    ]
    rests = [int(reading.stands_in and coded.rest_values is not None) for reading in readings]
    books = (None, None) if coded.books is None else (coded.books.keys, coded.books.values)
    call = _Call(
        tiers=ctypes.cast(tiers, ctypes.c_void_p),
        key_means=_address(coded.key_means, alive),
        value_means=_address(coded.value_means, alive),
        rest_values=_address(coded.rest_values, alive),
        key_books=_books(books[0], alive),
        value_books=_books(books[1], alive),
        pairs=_numbers(pairs, alive),
        reads=_numbers(reads, alive),
        rests=_numbers(rests, alive),
        tier_count=len(tiers),
        batch=coded.batch,
        kv_heads=coded.kv_heads,
        value_dim=coded.value_dim,
    )
    return _Plan(call, coded.value_dim, (tiers, *alive))


def _tier(tier: Tier, alive: list[object]) -> _Tier:
    """Codes of a tier, and where those of each head of each row of the batch are."""
    counts = [count for row in tier.counts for count in row]
    group_starts = [0] * len(tier.pair_counts)
    if tier.rung.group:
        of_stored = list(accumulate(groups_of(tuple(counts), tier.rung.group), initial=0))
        group_starts = [of_stored[row * tier.kv_heads + head] for row in tier.rows for head in range(tier.kv_heads)]
    return _Tier(
        _side(tier.rung.keys, tier.keys, alive),
        _side(tier.rung.values, tier.values, alive),
        *(_numbers(numbers, alive) for numbers in (tier.pair_starts, tier.pair_counts, group_starts)),
    )


def _side(codec: Codec, codes: Codes, alive: list[object]) -> _Side:
    streams = (ctypes.c_void_p * STREAMS)(*(_address(stream, alive) for stream in codes.streams))
    scales, groups = _address(codes.scales, alive), _address(codes.groups, alive)
    if isinstance(codec, Affine):
        kind = CHANNEL if codec.axis == "channel" else TOKEN
        channels = 8 * codes.streams[0].shape[1]
        group = codec.group if kind == CHANNEL else codec.channels(channels)
        return _Side(streams, scales, groups, kind, 0, codec.width, (ctypes.c_int64 * len(BOOKS))(), group)
    assert isinstance(codec, Centred)
    book = (ctypes.c_int64 * len(BOOKS))(*(BOOKS.index(name) for name in codec.books))
    return _Side(streams, scales, groups, CENTRED, len(codec.books), codec.width, book, 0)


def _books(books: Books | None, alive: list[object]) -> ctypes.Array[ctypes.c_void_p]:
    tensors: Iterable[Tensor | None] = () if books is None else (getattr(books, name) for name in BOOKS)
    return (ctypes.c_void_p * len(BOOKS))(*(_address(tensor, alive) for tensor in tensors))


def _address(tensor: Tensor | None, alive: list[object]) -> int | None:
    if tensor is None:
        return None
    alive.append(tensor := tensor.contiguous())
    return tensor.data_ptr()


def _numbers(numbers: Sequence[int], alive: list[object]) -> ctypes.c_void_p:
    array = (ctypes.c_int64 * len(numbers))(*numbers)
    alive.append(array)
    return ctypes.cast(array, ctypes.c_void_p)
