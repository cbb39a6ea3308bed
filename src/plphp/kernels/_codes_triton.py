# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of coded entries share: how codes become numbers in registers, and logits.

What is rotated stays so: queries come rotated. ``start`` is the first entry of a pair of a row and a KV head, and
``entry`` the number of an entry of that pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROTATED: tl.constexpr = tl.constexpr(1)
CHANNEL: tl.constexpr = tl.constexpr(2)
TOKEN: tl.constexpr = tl.constexpr(3)
"""What bit planes are: rotated numbers, or steps that entries share per channel, or channels per entry."""


@triton.jit
def centroids(
    streams, books, start, entry, channel, head, mask, BOOKS: tl.constexpr, PART: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """The sums of the centroids of some entries, float32 in the shape of the mask."""
    parts: tl.constexpr = DIM // PART
    part = channel // PART
    result = tl.zeros(mask.shape, tl.float32)
    for number in tl.static_range(BOOKS):
        of_pair = streams[number] + start * parts
        code = tl.load(of_pair + (entry * parts + part), mask=mask, other=0).to(tl.int32)
        at = ((head * parts + part) * 256 + code) * PART + channel % PART
        result += tl.load(books[number] + at, mask=mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def planes(streams, start, entry, channel, mask, FIRST: tl.constexpr, PLANES: tl.constexpr, DIM: tl.constexpr):
    """The codes of bit planes, float32 in the shape of the mask."""
    width: tl.constexpr = DIM // 8
    code = tl.zeros(mask.shape, tl.int32)
    for plane in tl.static_range(PLANES):
        of_pair = streams[FIRST + plane] + start * width
        byte = tl.load(of_pair + (entry * width + channel // 8), mask=mask, other=0).to(tl.int32)
        code = 2 * code + ((byte >> (channel % 8)) & 1)
    return code.to(tl.float32)


@triton.jit
def stepped(
    code, steps, start, group_start, entry, channel, mask,
    KIND: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """What codes of equal steps stand for; ``steps`` holds the lowest numbers, and behind them the steps."""
    width: tl.constexpr = DIM if KIND == CHANNEL else DIM // GROUP
    if KIND == CHANNEL:
        at = steps + group_start * (2 * width) + (entry // GROUP * (2 * width) + channel)
    else:
        at = steps + start * (2 * width) + (entry * (2 * width) + channel // GROUP)
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return code * tl.load(at + width, mask=mask, other=0.0).to(tl.float32) + low


@triton.jit
def logits_of(
    q, turned, streams, steps, books, start, group_start, head, entry, inside, factor, shift,
    BOOKS: tl.constexpr, PART: tl.constexpr, PLANES: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Products [TILE, ENTRIES] of queries [TILE, WIDE], as they are and rotated in float32, with keys without their
    mean."""
    channel, at = tl.arange(0, WIDE)[:, None], entry[None, :]
    mask = inside[None, :] & (channel < DIM)
    logits = tl.zeros([TILE, ENTRIES], tl.float32)
    if BOOKS > 0:
        k = centroids(streams, books, start, at, channel, head, mask, BOOKS, PART, DIM)
        logits += _product(q, k)
    if PLANES > 0:
        code = planes(streams, start, at, channel, mask, BOOKS, PLANES, DIM) * factor + shift
        if KIND == ROTATED:
            # Codes are exact in any dtype, and so the step of an entry comes last.
            step = tl.load(steps + start + entry, mask=inside, other=0.0).to(tl.float32)
            code, high = code.to(q.dtype), turned.to(q.dtype)
            own = tl.dot(high, code, input_precision="ieee")
            if q.dtype != tl.float32:
                own += tl.dot((turned - high.to(tl.float32)).to(q.dtype), code, input_precision="ieee")
            logits += own * step[None, :]
        else:
            k = stepped(code, steps, start, group_start, at, channel, mask, KIND, GROUP, DIM)
            logits += _product(q, k)
    return logits


@triton.jit
def _product(q, k):
    """Products of queries with float32 keys: with these in the queries' dtype, and with what is then left of them, so
    that rounding does not decide what a query reads."""
    high = k.to(q.dtype)
    result = tl.dot(q, high, input_precision="ieee")
    if q.dtype != tl.float32:
        result += tl.dot(q, (k - high.to(tl.float32)).to(q.dtype), input_precision="ieee")
    return result
