# SPDX-License-Identifier: Apache-2.0
"""Where the entries of a block lie of which every row and every KV head holds its own number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


class Ragged:
    """The places of entries without padding: row after row and, within a row, head after head, each in prompt order.

    Rows are reached through an index, so that beam search reorders them without moving any entry.

    Attributes
    ----------
    counts : tuple of tuple of int
        ``[stored row][kv head]``: entries of each.
    rows : tuple of int
        For each row of the batch, the stored row that it reads.
    """

    counts: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.rows)

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return len(self.counts[0])

    def pairs(self) -> Tensor:
        """The pair of each entry, ``stored row * kv_heads + KV head``, int64 [entries] on the CPU."""
        return torch.repeat_interleave(torch.tensor([count for row in self.counts for count in row]))

    def check_entries(self, entries: int) -> None:
        """Raise ValueError unless the counts are those of so many entries."""
        total = sum(map(sum, self.counts))
        if total != entries:
            raise ValueError(f"counts add up to {total} entries, but there are {entries}.")

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """The first entry of each stored row."""
        return tuple(accumulate((sum(row) for row in self.counts[:-1]), initial=0))

    @cached_property
    def index(self) -> Tensor:
        """int64 [2, batch, kv_heads] on the device of the entries: the first entry and the number of entries of each
        head of each row."""
        index = torch.tensor([self.pair_starts, self.pair_counts], dtype=torch.int64)
        return index.view(2, self.batch, self.kv_heads).to(self.device, non_blocking=True)

    @cached_property
    def pair_counts(self) -> list[int]:
        """Entries of each head of each row of the batch, row after row."""
        return [count for stored in self.rows for count in self.counts[stored]]

    @cached_property
    def pair_starts(self) -> list[int]:
        """The first entry of each head of each row of the batch, row after row."""
        return [
            start
            for stored in self.rows
            for start in accumulate(self.counts[stored][:-1], initial=self._starts[stored])
        ]

    @cached_property
    def descending(self) -> tuple[list[int], Tensor]:
        """The heads of all rows, ``row * kv_heads + head``, from those with most entries down; and the same as int64
        [batch * kv_heads] on the device of the entries."""
        order = sorted(range(len(self.pair_counts)), key=self.pair_counts.__getitem__, reverse=True)
        return order, torch.tensor(order, dtype=torch.int64).to(self.device, non_blocking=True)

    def entries_of(self, stored: int) -> slice:
        """The entries of a stored row."""
        start = self._starts[stored]
        return slice(start, start + sum(self.counts[stored]))

    def selected(self, rows: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """The stored rows that are still read when rows of the batch are taken in a new order, and by which of them."""
        stored = [self.rows[row] for row in rows]
        live = sorted(set(stored))
        return live, tuple(live.index(row) for row in stored)


def counts_of(pair: Tensor, rows: int, kv_heads: int) -> tuple[tuple[int, ...], ...]:
    """``[row][kv head]``: how many entries are of each pair ``row * kv_heads + KV head``, int64 [entries]."""
    counts = torch.bincount(pair, minlength=rows * kv_heads).tolist()
    return tuple(tuple(counts[row * kv_heads : (row + 1) * kv_heads]) for row in range(rows))
