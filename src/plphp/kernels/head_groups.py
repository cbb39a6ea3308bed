# SPDX-License-Identifier: Apache-2.0
"""Heads of a packed block side by side, for what torch does to many of them at once."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from .packed import PackedKV

ALONE = 256
"""Entries from which on a head is read where it lies, on a CPU: padding it takes longer than a call of its own."""
FEW = 48
"""Entries that are little to a call."""
AT_ONCE, AT_ONCE_ON_CPU = 2**24, 2**20
"""Most numbers of a group that are held at once, on a CPU so many as its caches hold; a head is never cut."""


class HeadGroup(NamedTuple):
    """Heads of any rows side by side.

    Parameters
    ----------
    pairs : Tensor
        int64 [heads]; ``row of the batch * kv_heads + KV head`` of each.
    keys, values : Tensor
        [heads, longest, dim]. Behind its entries a head has copies of its last, so that nothing of another head is
        read, and what is no number stays in its head.
    padding : Tensor, optional
        bool [heads, longest]; True behind the entries of a head. None where all hold as many.
    """

    pairs: Tensor
    keys: Tensor
    values: Tensor
    padding: Tensor | None


def head_groups(block: PackedKV, numbers: int) -> Iterator[HeadGroup]:
    """Put heads that hold about as many entries side by side, those with most entries first.

    Heads of as many entries that lie behind each other are views. So are, on a CPU, heads from `ALONE` entries on.
    The rest is gathered, with at most half as much padding as entries, and a few more.

    Parameters
    ----------
    block : PackedKV
        Its heads.
    numbers : int
        Numbers that the caller holds for an entry of a head at once, of its keys or its logits: groups are cut so that
        all of a group are at most `AT_ONCE`, or on a CPU `AT_ONCE_ON_CPU`.

    Yields
    ------
    HeadGroup
        Every head of every row of the batch is in one group. Those without entries are in the last ones, alone.
    """
    at_once = AT_ONCE_ON_CPU if block.keys.device.type == "cpu" else AT_ONCE
    order, on_device = block.descending
    first = 0
    while first < len(order):
        longest = block.pair_counts[order[first]]
        most = max(1, at_once // max(1, longest * numbers))
        heads, side_by_side = _alike(block, order[first : first + most])
        pairs = on_device[
            first : first + heads
        ]  # a view: while a CUDA graph is captured, nothing may come from the host
        if side_by_side:
            start = block.pair_starts[order[first]]
            yield HeadGroup(pairs, *block.shaped(slice(start, start + heads * longest), heads, longest), None)
        else:
            yield _padded(block, pairs, longest)
        first += heads


def _alike(block: PackedKV, pairs: list[int]) -> tuple[int, bool]:
    """How many of the first pairs make a group, and whether they hold as many entries, which lie side by side."""
    starts, counts = block.pair_starts, block.pair_counts
    start, longest = starts[pairs[0]], counts[pairs[0]]
    side_by_side = _first(
        (starts[pair], counts[pair]) != (start + place * longest, longest) for place, pair in enumerate(pairs)
    )
    if longest >= ALONE and block.keys.device.type == "cpu":
        return side_by_side, True
    alike = _first(counts[pair] < min(1, longest) or 3 * counts[pair] < 2 * longest - FEW for pair in pairs)
    return alike, alike == side_by_side


def _first(signs: Iterable[bool]) -> int:
    """The place of the first that is True, or the number of all."""
    return sum(1 for _ in takewhile(operator.not_, signs))


def _padded(block: PackedKV, pairs: Tensor, longest: int) -> HeadGroup:
    """Gather heads that hold up to ``longest`` entries, and at least one."""
    starts, counts = block.index.flatten(1)[:, pairs, None]
    place = torch.arange(longest, device=pairs.device)
    entries = (starts + torch.minimum(place, counts - 1)).flatten()
    keys, values = (
        states.index_select(0, entries).view(len(pairs), longest, states.shape[1])
        for states in (block.keys, block.values)
    )
    return HeadGroup(pairs, keys, values, place >= counts)
