# SPDX-License-Identifier: Apache-2.0
"""The ledger of a layer: of which token each entry is that lies before the tail, and how it was scored.

Entries themselves do not know it. A ledger is kept where images are to fade, and lies in host memory: 8 bytes an entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plphp.kernels.packed import PackedKV
from plphp.kernels.prompt_codes import PromptCodes


@dataclass(frozen=True)
class Labels:
    """The tokens of some entries, in their order.

    Parameters
    ----------
    block : PackedKV
        The logical position of each entry, int32 [entries, 1], and its score, float32 [entries, 1], in the place of
        keys and values: they are chosen, joined and put in order as these are.
    """

    block: PackedKV

    @classmethod
    def of(cls, position: Tensor, score: Tensor, counts: tuple[tuple[int, ...], ...]) -> Labels:
        """Labels of entries that lie row after row and head after head.

        Parameters
        ----------
        position, score : Tensor
            [entries].
        counts : tuple of tuple of int
            ``[row][kv head]``: entries of each.
        """
        columns = position.cpu().to(torch.int32)[:, None], score.cpu().to(torch.float32)[:, None]
        return cls(PackedKV(*columns, counts, tuple(range(len(counts)))))

    @classmethod
    def where(cls, mask: Tensor, position: Tensor, score: Tensor) -> Labels:
        """Labels of the entries of a mask, bool [batch, kv_heads, seq], with positions [batch, seq] and scores."""
        counts = tuple(tuple(row) for row in mask.sum(-1).tolist())
        return cls.of(position[:, None].expand(mask.shape)[mask], score[mask], counts)

    @property
    def position(self) -> Tensor:
        """int64 [entries]."""
        return self.block.keys[:, 0].long()

    @property
    def score(self) -> Tensor:
        """float32 [entries]."""
        return self.block.values[:, 0]

    @property
    def nbytes(self) -> int:
        """Bytes of both columns."""
        return self.block.nbytes

    def with_score(self, score: Tensor) -> Labels:
        """The same entries with other scores, float32 [entries]."""
        return Labels(replace(self.block, values=score[:, None]))

    def nothing(self) -> Labels:
        """The same rows without entries."""
        counts = tuple((0,) * self.block.kv_heads for _ in self.block.counts)
        return Labels(PackedKV(self.block.keys[:0], self.block.values[:0], counts, self.block.rows))

    def select(self, rows: Sequence[int]) -> Labels:
        """See `PackedKV.select`."""
        return Labels(self.block.select(rows))

    def unshared(self) -> Labels:
        """See `PackedKV.unshared`."""
        return Labels(self.block.unshared())

    def of_entries(self, entries: Tensor, pair: Tensor, rows: int) -> Labels:
        """See `PackedKV.of_entries`."""
        return Labels(self.block.of_entries(entries, pair, rows))

    def appended(self, newer: Labels) -> Labels:
        """See `PackedKV.appended`."""
        return Labels(self.block.appended(newer.block))

    @classmethod
    def stacked(cls, labels: Sequence[Labels]) -> Labels:
        """See `PackedKV.stacked`."""
        return cls(PackedKV.stacked([own.block for own in labels]))


def codes_of(coded: Sequence[object]) -> PromptCodes | None:
    """Of the blocks of few bits of a layer, the one that a ledger is of."""
    return next((block for block in coded if isinstance(block, PromptCodes)), None)


@dataclass(frozen=True)
class LayerLedger:
    """The ledger of a layer.

    Parameters
    ----------
    whole : Labels
        Of the entries of `LayerEntries.prefix`, of text and vision.
    coded : tuple of Labels
        Of each tier of the layer's `PromptCodes`, whose rows are its parts.
    weights : tuple of float
        By row of the batch, the bytes that the method alone would hold of its vision entries.
    """

    whole: Labels
    coded: tuple[Labels, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def nbytes(self) -> int:
        """Its bytes, in host memory."""
        return self.whole.nbytes + sum(labels.nbytes for labels in self.coded)

    def select(self, rows: Sequence[int], codes: PromptCodes | None) -> LayerLedger:
        """Take rows of the batch in a new order, as the layer does with what it holds."""
        parts = [] if codes is None else codes.parts_of(rows)
        coded = tuple(labels.select(parts) for labels in self.coded) if parts else ()
        return LayerLedger(self.whole.select(rows), coded, tuple(self.weights[row] for row in rows))
