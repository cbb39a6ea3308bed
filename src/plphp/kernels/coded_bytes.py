# SPDX-License-Identifier: Apache-2.0
"""How many bytes of coded entries are held for a row, and how many of them a step reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .codecs import Codec, Codes, groups_of
from .coded import CodedKV, Tier


def tier_nbytes(tier: Tier, stored_row: int) -> int:
    """Bytes of a stored row in a tier."""
    counts = tier.counts[stored_row]
    return _side(tier.rung.keys, tier.keys, counts) + _side(tier.rung.values, tier.values, counts)


def index_nbytes(tier: Tier, stored_row: int) -> int:
    """Those of them that the index reads: the first stream of the keys, and what gives its numbers their size."""
    return _side(tier.rung.keys, tier.keys, tier.counts[stored_row], index=True)


def means_nbytes(block: CodedKV, stored_row: int) -> int:
    """Bytes of the means that the tiers of a stored row need, and of what stands in for its rest."""
    rungs = [tier.rung for tier in block.tiers if any(tier.counts[stored_row])]
    needed = (
        (block.key_means, any(rung.keys.centred for rung in rungs)),
        (block.value_means, any(rung.values.centred for rung in rungs)),
        (block.rest_values, block.reading[stored_row].stands_in),
    )
    return sum(mean[: block.kv_heads].nbytes for mean, needs in needed if mean is not None and needs)


def row_nbytes(block: CodedKV, row: int) -> int:
    """Bytes that are held for a row of the batch, 0 without entries; rows that share a stored row count it each."""
    stored = block.rows[row]
    if not any(block.held[stored]):
        return 0
    return sum(tier_nbytes(tier, stored) for tier in block.tiers) + means_nbytes(block, stored)


def read_nbytes(block: CodedKV, row: int, read: Sequence[float] | None = None) -> float:
    """Bytes that a query of a row of the batch reads.

    Parameters
    ----------
    block : CodedKV
    row : int
    read : sequence of float, optional
        Entries of each tier that are read, in sum over the KV heads, as
        `plphp.kernels.coded_attention.counting_reads` notes them. None for the most that it can be: whatever is read is
        of the tiers with most bytes.
    """
    stored = block.rows[row]
    reading = block.reading[stored]
    if reading.share == 1 or not any(block.held[stored]):
        return row_nbytes(block, row)
    if read is None:
        read = _most(block, stored)
    total: float = means_nbytes(block, stored)
    for tier, entries in zip(block.tiers, read, strict=True):
        held = sum(tier.counts[stored])
        if held:
            index = index_nbytes(tier, stored)
            total += index + entries / held * (tier_nbytes(tier, stored) - index)
    return total


def _most(block: CodedKV, stored: int) -> list[int]:
    """Entries of each tier that are read if the heaviest are."""
    left = [block.reading[stored].entries(held) for held in block.held[stored]]
    most = [0] * len(block.tiers)
    heaviest = sorted(
        range(len(block.tiers)),
        key=lambda number: -_of_entry(block.tiers[number]),
    )
    for number in heaviest:
        taken = [min(a, b) for a, b in zip(left, block.tiers[number].counts[stored], strict=True)]
        left = [a - b for a, b in zip(left, taken, strict=True)]
        most[number] = sum(taken)
    return most


def _of_entry(tier: Tier) -> float:
    """Bytes of an entry of a tier beside its index."""
    key, value = tier.keys, tier.values
    streams = sum(stream.shape[1] for stream in (*key.streams[1:], *value.streams))
    scales = sum(codes.scales.shape[1] * codes.scales.itemsize for codes in (key, value) if codes.scales is not None)
    return streams + scales


def _side(codec: Codec, codes: Codes, counts: Sequence[int], index: bool = False) -> int:
    """Bytes of the keys or values of a row with so many entries in each KV head."""
    streams: tuple[Tensor, ...] = codes.streams[:1] if index else codes.streams
    total = sum(counts) * sum(stream.shape[1] for stream in streams)
    if codes.scales is not None and (codec.index_scaled or not index):
        total += sum(counts) * codes.scales.shape[1] * codes.scales.itemsize
    if codes.groups is not None:
        total += sum(groups_of(tuple(counts), codec.group)) * codes.groups[0].nbytes
    return total
