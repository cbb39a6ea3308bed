# SPDX-License-Identifier: Apache-2.0
"""How much of the vision KV variants hold, and how much of it their decoding steps read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from plphp.engines.hf.branching import Branches
from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.layer import PrunedLayer
from plphp.kernels.coded import CodedKV
from plphp.kernels.coded_attention import counting_reads
from plphp.kernels.coded_bytes import read_nbytes, row_nbytes
from plphp.kernels.prompt_codes import plain


@dataclass(frozen=True)
class Shares:
    """What a variant holds of a prompt, as fractions of the vision entries of a full cache for the sample as it is.

    Parameters
    ----------
    kept : float
        Bytes held, less those of the prompt's text; mean over layers and KV heads. For a method that holds entries
        whole and evicts no text these are the vision entries kept; a method that evicts text is counted by the memory
        it holds.
    vision : float
        Vision entries held, whole or in few bits.
    read : float, optional
        Bytes that a decoding step reads of them, see ``kept``; None where it is not measured.
    """

    kept: float
    vision: float
    read: float | None


@dataclass(frozen=True)
class HeldVision:
    """What a cache of one row holds of the vision tokens that it has read, by its live tensors.

    Parameters
    ----------
    nbytes : int
        Bytes, codes with all that they need but codebooks; less those that the text would take, so that evicted text
        counts like evicted vision entries.
    full : int
        Those that a full cache holds of the vision tokens.
    entries : float
        Vision entries held, whole or in few bits, as a fraction of the full cache's.
    """

    nbytes: int
    full: int
    entries: float

    @classmethod
    def of(cls, cache: PrunedCache, vision: int) -> HeldVision:
        """Measure a cache that has read a number of vision tokens, all of them in prompts that were pruned."""
        nbytes = full = entries = full_entries = 0
        for layer in cache.layers:
            if not isinstance(layer, PrunedLayer) or layer.prefix is None:
                continue
            text, heads = layer.prefix_length - vision, layer.entry_nbytes // layer.pair_nbytes
            nbytes += layer.prefix.nbytes + sum(block.nbytes for block in layer.coded) - text * layer.entry_nbytes
            entries += sum(map(sum, layer.prefix.counts)) - text * heads
            entries += sum(sum(map(sum, block.held)) for block in layer.coded)
            full += vision * layer.entry_nbytes
            full_entries += vision * heads
        return cls(nbytes, full, entries / max(1, full_entries))


class UnreadShares:
    """Counts what passes over a draft leave unread.

    Parameters
    ----------
    branches : Branches
        What is read.
    vision : int
        Vision tokens of the prompt.
    """

    def __init__(self, branches: Branches, vision: int) -> None:
        layers = [layer for layer in branches.cache.layers if isinstance(layer, PrunedLayer)]
        self._blocks = [block for layer in layers for block in plain(layer.coded)]
        self._full = max(1, sum(layer.entry_nbytes for layer in layers) * vision)
        rows = range(len(branches.configs))
        self._recalling = {row for row in rows if any(_recalls(block, row) for block in self._blocks)}
        self._unread, self._tokens = [0.0] * len(rows), [0] * len(rows)

    @contextmanager
    def counted(self, tokens: int, rows: Collection[int] | None = None) -> Iterator[None]:
        """Count a pass over some tokens of the draft while the context is open, for some rows; default: all."""
        if not any(block.recalls for block in self._blocks):
            yield
            return
        with counting_reads() as counts:
            yield
        counted = range(len(self._tokens)) if rows is None else rows
        for row in counted:
            self._tokens[row] += tokens
        for block, read in zip(self._blocks, counts, strict=True):
            entries = read.tolist()
            for row in counted:
                self._unread[row] += tokens * (row_nbytes(block, row) - read_nbytes(block, row, entries[row]))

    def taken_off(self, shares: Sequence[Shares], of_sample: float) -> list[Shares]:
        """The shares of the variants, less what a step leaves unread; not measured where there was no step to count.

        Parameters
        ----------
        shares : sequence of Shares
            As if everything that is held were read.
        of_sample : float
            Vision tokens of the prompt, over those of the sample as it is.
        """
        return [replace(own, read=self._read(own.kept, row, of_sample)) for row, own in enumerate(shares)]

    def _read(self, kept: float, row: int, of_sample: float) -> float | None:
        if row not in self._recalling:
            return kept
        tokens = self._tokens[row]
        return kept - of_sample * self._unread[row] / self._full / tokens if tokens else None


def _recalls(block: CodedKV, row: int) -> bool:
    """Whether a row reads less of a block than it holds."""
    stored = block.rows[row]
    return block.reading[stored].share < 1 and any(block.held[stored])
