# SPDX-License-Identifier: Apache-2.0
"""Heads of a packed block side by side, for what torch does to many of them at once."""

from __future__ import annotations

from collections.abc import Iterator
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
    counts = block.pair_counts
    at_once = AT_ONCE_ON_CPU if block.keys.device.type == "cpu" else AT_ONCE
    order = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
    first = 0
    while first < len(order):
        longest = counts[order[first]]
        most = max(1, at_once // max(1, longest * numbers))
        pairs, lie_side_by_side = _alike(block, order[first : first + most])
        first += len(pairs)
        if lie_side_by_side:
            start = block.pair_starts[pairs[0]]
            keys, values = block.shaped(slice(start, start + len(pairs) * longest), len(pairs), longest)
            yield HeadGroup(torch.tensor(pairs, device=keys.device), keys, values, None)
        else:
            yield _padded(block, pairs, longest)


def _alike(block: PackedKV, pairs: list[int]) -> tuple[list[int], bool]:
    """The first pairs that make a group, and whether their entries lie side by side and are as many."""
    starts, counts = block.pair_starts, block.pair_counts
    longest, start = counts[pairs[0]], starts[pairs[0]]
    run = sum(
        1
        for _ in takewhile(
            lambda at: counts[at[1]] == longest and starts[at[1]] == start + at[0] * longest, enumerate(pairs)
        )
    )
    if longest >= ALONE and block.keys.device.type == "cpu":
        return pairs[:run], True
    alike = takewhile(lambda pair: counts[pair] >= min(1, longest) and 3 * counts[pair] >= 2 * longest - FEW, pairs)
    found = list(alike)
    return found, len(found) == run


def _padded(block: PackedKV, pairs: list[int], longest: int) -> HeadGroup:
    """Gather heads that hold up to ``longest`` entries, and at least one."""
    chosen = torch.tensor(pairs, device=block.keys.device)
    starts, counts = block.index.flatten(1)[:, chosen, None]
    place = torch.arange(longest, device=chosen.device)
    entries = (starts + torch.minimum(place, counts - 1)).flatten()
    keys, values = (
        states.index_select(0, entries).view(len(pairs), longest, states.shape[1])
        for states in (block.keys, block.values)
    )
    return HeadGroup(chosen, keys, values, place >= counts)
