# SPDX-License-Identifier: Apache-2.0
"""Keys and values of which every row and every KV head holds its own number of entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from .ragged import Ragged, counts_of

PLACES = ("pair_counts", "pair_starts", "index", "descending")
"""What a block works out once of where its entries lie, whatever their dtype."""


@dataclass(frozen=True)
class PackedKV(Ragged):
    """An immutable, ragged block of keys and values without padding.

    Entries lie row after row and, within a row, head after head, each in prompt order. Rows are reached through
    an index, so that beam search reorders them without moving any entry.

    Parameters
    ----------
    keys, values : Tensor
        [entries, dim]; the entries of all stored rows and heads.
    counts : tuple of tuple of int
        ``[stored row][kv head]``: entries of each.
    rows : tuple of int
        For each row of the batch, the stored row that it reads.
    """

    keys: Tensor
    values: Tensor
    counts: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        self.check_entries(self.keys.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor] | None:
        """Views on all rows at once, [batch, kv_heads, kept, dim]; None unless every head of every row holds as many
        entries and the rows are read in the order in which they are stored."""
        if self.rows != tuple(range(len(self.counts))) or len({n for row in self.counts for n in row}) != 1:
            return None
        return self.shaped(slice(None), self.batch, self.kv_heads, self.counts[0][0])

    def shaped(self, entries: slice, *shape: int) -> tuple[Tensor, Tensor]:
        """Views on entries as [*shape, dim]; the dim is named because view cannot infer it where there are none."""
        keys, values = self.keys[entries], self.values[entries]
        return keys.view(*shape, keys.shape[1]), values.view(*shape, values.shape[1])

    def select(self, rows: Sequence[int]) -> PackedKV:
        """Take rows of the batch in a new order; stored rows that nobody reads any more are freed."""
        return self._stored(*self.selected(rows))

    def unshared(self) -> PackedKV:
        """The same rows, each with a stored row of its own, in the order of the batch."""
        return self._stored(self.rows, tuple(range(self.batch)))

    def _stored(self, live: Sequence[int], rows: tuple[int, ...]) -> PackedKV:
        """Those of some stored rows, of which each row of the batch reads one."""
        if list(live) == list(range(len(self.counts))):
            return PackedKV(self.keys, self.values, self.counts, rows)
        pieces = [self.entries_of(row) for row in live]
        return PackedKV(
            torch.cat([self.keys[piece] for piece in pieces]),
            torch.cat([self.values[piece] for piece in pieces]),
            tuple(self.counts[row] for row in live),
            rows,
        )

    def of_entries(self, entries: Tensor, pair: Tensor, rows: int) -> PackedKV:
        """Copy some entries to other rows.

        Parameters
        ----------
        entries : Tensor
            int64 [taken]; in the order of their rows and heads.
        pair : Tensor
            int64 [taken]; ``row * kv_heads + KV head`` of each, rising.
        rows : int
            Rows of the result.
        """
        keys, values = (states.index_select(0, entries.to(states.device)) for states in (self.keys, self.values))
        return PackedKV(keys, values, counts_of(pair, rows, self.kv_heads), tuple(range(rows)))

    @classmethod
    def stacked(cls, blocks: Sequence[PackedKV]) -> PackedKV:
        """Put the rows of several blocks below each other."""
        # The number of stored rows before each block; the last sum is before none.
        starts = [0, *accumulate(len(block.counts) for block in blocks)]
        return cls(
            torch.cat([block.keys for block in blocks]),
            torch.cat([block.values for block in blocks]),
            tuple(row for block in blocks for row in block.counts),
            tuple(start + row for start, block in zip(starts, blocks, strict=False) for row in block.rows),
        )

    def picked(self, keep: Tensor, below: Sequence[PackedKV] = ()) -> PackedKV:
        """Make rows that each take some entries of this block's only row, and put the rows of more blocks below them.

        Parameters
        ----------
        keep : Tensor
            bool [rows, kv_heads, seq]; entries of this block, which holds ``seq`` for each head of its only row.
        below : sequence of PackedKV
            Their rows follow, whole.

        Returns
        -------
        PackedKV
            It shares no memory with this block.
        """
        sources = PackedKV.stacked([self, *below])
        own = keep.to(self.keys.device).flatten().nonzero()[:, 0] % len(self.keys)
        rest = torch.arange(len(self.keys), len(sources.keys), device=own.device)
        # One gather for everything: the result is much larger than what it is taken from.
        entries = torch.cat([own, rest])
        return PackedKV(
            sources.keys.index_select(0, entries),
            sources.values.index_select(0, entries),
            (*(tuple(row) for row in keep.sum(-1).tolist()), *sources.counts[1:]),
            (*range(len(keep)), *(len(keep) + row - 1 for row in sources.rows[1:])),
        )

    def narrowed(self, held: Tensor, keep: Tensor) -> PackedKV:
        """Copy some of the entries of a block whose rows are in the order in which they are stored.

        Parameters
        ----------
        held : Tensor
            bool [batch, kv_heads, seq]; the tokens whose entries the block holds, as it was compacted by.
        keep : Tensor
            bool [batch, kv_heads, seq]; those that stay, all of them held.

        Returns
        -------
        PackedKV
            It shares no memory with this block.
        """
        entries = keep[held].nonzero()[:, 0].to(self.keys.device)
        return PackedKV(
            self.keys.index_select(0, entries),
            self.values.index_select(0, entries),
            tuple(tuple(row) for row in keep.sum(-1).tolist()),
            self.rows,
        )

    def appended(self, newer: PackedKV) -> PackedKV:
        """Put the entries of a newer block behind those of this block, row by row and head by head."""
        keys, values = (
            torch.cat([piece for pair in zip(own, added, strict=True) for piece in pair])
            for own, added in zip(self._split(), newer._split(), strict=True)
        )
        counts = tuple(
            tuple(a + b for a, b in zip(self.counts[own], newer.counts[added], strict=True))
            for own, added in zip(self.rows, newer.rows, strict=True)
        )
        return PackedKV(keys, values, counts, tuple(range(self.batch)))

    def to(self, keys: torch.dtype, values: torch.dtype) -> PackedKV:
        """Cast keys and values to these dtypes; the result is the block itself if it has them."""
        if (self.keys.dtype, self.values.dtype) == (keys, values):
            return self
        cast = replace(self, keys=self.keys.to(keys), values=self.values.to(values))
        # Under autocast a block is cast at every step: where its entries lie is worked out once, and on the host, which
        # a step that is being captured must not do.
        cast.__dict__.update({name: getattr(self, name) for name in PLACES})
        return cast

    def _split(self) -> tuple[list[Tensor], list[Tensor]]:
        """Views on the keys, and on the values, of each head of each row of the batch, [kept, dim]."""
        sizes = [count for row in self.counts for count in row]
        read = [stored * self.kv_heads + head for stored in self.rows for head in range(self.kv_heads)]
        keys, values = self.keys.split(sizes), self.values.split(sizes)
        return [keys[head] for head in read], [values[head] for head in read]
