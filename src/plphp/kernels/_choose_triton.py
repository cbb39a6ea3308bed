# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that chooses what a query reads, and the table that this and the kernels of tiers read.

It says where entries lie, int32 [fields, pairs of a row and a KV head]: the stored pair, the entries that it holds,
those that a query reads, whether the rest stands in; then for each tier the first entry, their number, how many of the
pair lie in the tiers before, and the first group of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS: tl.constexpr = tl.constexpr(4)
"""Fields of the table before those of the tiers, and of each tier."""


NO_NUMBER: tl.constexpr = tl.constexpr(0x7F800001)
"""The bits of what is no number: more than any other, so that it is chosen first, as it is by the order of torch."""


@triton.jit
def choose(
    mass, table, chosen, ends, logits, pairs, tiers, longest, most, length,
    GROUP: tl.constexpr, RESTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The entries of a pair that a query reads: those with the largest mass, and of equal ones the first. NaN counts as
    the largest mass, and all NaN are equal.

    Their places among all that the pair holds are written to ``chosen``, int32 [units, most], in their order, and to
    ``ends``, int32 [units, tiers], how many there are up to the end of each tier. With ``RESTS`` their logits become
    -inf, so that those of the rest are left. The program id is the unit: a query of a pair.
    """
    unit = tl.program_id(0)
    pair, place = unit // length, unit % length
    held, wanted = tl.load(table + pairs + pair), tl.load(table + 2 * pairs + pair)
    masses = mass + unit.to(tl.int64) * longest
    # By halving, in the bits of the masses, which are in the order of the masses: at most `wanted` are above `high`,
    # and more than that above `low`. 64 bits, as the differences of 32 overflow.
    low, high, above = tl.full([], -2, tl.int64), tl.full([], NO_NUMBER, tl.int64), tl.full([], 0, tl.int32)
    while (high - low > 1) & (above != wanted):
        middle = low + (high - low) // 2
        count = tl.full([], 0, tl.int32)
        for first in range(0, held, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            count += tl.sum((_bits(masses, entry, entry < held) > middle).to(tl.int32))
        fits = count <= wanted
        above = tl.where(fits, count, above)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    equals, taken = wanted - above, tl.full([], 0, tl.int32)
    for tier in range(tiers):
        of_tier = table + (FIELDS + FIELDS * tier) * pairs + pair
        begin = tl.load(of_tier + 2 * pairs)
        end = begin + tl.load(of_tier + pairs)
        for first in range(begin, end, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            bits = _bits(masses, entry, entry < end)
            equal = (bits == high).to(tl.int32)
            read = (bits > high) | ((equal > 0) & (tl.cumsum(equal, 0) <= equals))
            number = taken + tl.cumsum(read.to(tl.int32), 0) - 1
            tl.store(chosen + unit.to(tl.int64) * most + number, entry, mask=read)
            equals -= tl.minimum(equals, tl.sum(equal))
            taken += tl.sum(read.to(tl.int32))
            if RESTS:
                for of_group in range(GROUP):
                    slot = (pair.to(tl.int64) * GROUP + of_group) * length + place
                    tl.store(logits + slot * longest + entry, float("-inf"), mask=read)
        tl.store(ends + unit * tiers + tier, taken)


@triton.jit
def _bits(masses, entry, inside):
    """The bits of masses, int64: from 0 up to NO_NUMBER, which NaN of any sign and payload has; -3 where there is no
    entry."""
    own = tl.load(masses + entry, mask=inside, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(inside, tl.minimum(own, NO_NUMBER), -3).to(tl.int64)
