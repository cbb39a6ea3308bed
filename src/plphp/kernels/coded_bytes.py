# SPDX-License-Identifier: Apache-2.0
"""How many bytes of coded entries are held for a row, and how many of them a step reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .codecs import SCALE, Codec, Codes, groups_of
from .coded import CodedKV, Reading, Tier, needs_means
from .rungs import Rung

SHARED = 32
"""Bits of a channel that a group of entries shares."""


def head_nbytes(rung: Rung, entries: int, dim: int, value_dim: int) -> int:
    """Bytes that so many entries of a KV head take in a rung: codes, scales and groups."""
    return _of_shape(rung.keys, entries, dim) + _of_shape(rung.values, entries, value_dim)


def means_of_shape(rungs: Iterable[Rung], reading: Reading, dim: int, value_dim: int) -> int:
    """Bytes of the means that a row needs for each KV head, with entries in some rungs."""
    of_keys, of_values, of_rest = needs_means(rungs, reading)
    return SCALE.itemsize * (of_keys * dim + (of_values + of_rest) * value_dim)


def read_of_shape(counts: Mapping[Rung, int], reading: Reading, dim: int, value_dim: int) -> float:
    """Bytes that a query reads at most of the entries of a KV head in some rungs, without means."""
    held = {rung: head_nbytes(rung, count, dim, value_dim) for rung, count in counts.items()}
    if reading.share == 1:
        return sum(held.values())
    index = {rung: _of_shape(rung.keys, count, dim, index=True) for rung, count in counts.items()}
    left, total = reading.entries(sum(counts.values())), float(sum(index.values()))
    for rung in sorted(counts, key=lambda rung: (index[rung] - held[rung]) / counts[rung]):
        taken = min(left, counts[rung])
        left -= taken
        total += taken / counts[rung] * (held[rung] - index[rung])
    return total


def tier_nbytes(tier: Tier, stored_row: int) -> int:
    """Bytes of a stored row in a tier."""
    counts = tier.counts[stored_row]
    return _side(tier.rung.keys, tier.keys, counts) + _side(tier.rung.values, tier.values, counts)


def index_nbytes(tier: Tier, stored_row: int) -> int:
    """Those of them that the index reads: the first stream of the keys, and what gives its numbers their size."""
    return _side(tier.rung.keys, tier.keys, tier.counts[stored_row], index=True)


def means_nbytes(block: CodedKV, stored_row: int) -> int:
    """Bytes of the means that the tiers of a stored row need, and of what stands in for its rest."""
    rungs = (tier.rung for tier in block.tiers if any(tier.counts[stored_row]))
    needs = needs_means(rungs, block.reading[stored_row])
    means = zip((*block.means, block.rest_values), needs, strict=True)
    return sum(mean[: block.kv_heads].nbytes for mean, needed in means if needed and mean is not None)


def means_there(block: CodedKV) -> int:
    """Bytes of the means that lie there for each stored row, whether its own tiers need them or those of others."""
    means = (*block.means, block.rest_values)
    return sum(mean[: block.kv_heads].nbytes for mean in means if mean is not None)


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
    held = [number for number, tier in enumerate(block.tiers) if any(tier.counts[stored])]
    heaviest = sorted(held, key=lambda number: -_of_entry(block.tiers[number], stored))
    for number in heaviest:
        taken = [min(a, b) for a, b in zip(left, block.tiers[number].counts[stored], strict=True)]
        left = [a - b for a, b in zip(left, taken, strict=True)]
        most[number] = sum(taken)
    return most


def _of_entry(tier: Tier, stored: int) -> float:
    """Bytes of an entry of a stored row in a tier beside its index, by which `read_of_shape` orders rungs, too."""
    return (tier_nbytes(tier, stored) - index_nbytes(tier, stored)) / sum(tier.counts[stored])


def _of_shape(codec: Codec, entries: int, dim: int, index: bool = False) -> int:
    """Bytes of the keys or values of a KV head, or those that the index reads."""
    bits = codec.index_bits(dim) if index else codec.bits(dim)
    if not codec.group:
        return round(entries * bits * dim / 8)
    [groups] = groups_of((entries,), codec.group)
    return round((entries * (bits - SHARED / codec.group) + groups * SHARED) * dim / 8)


def _side(codec: Codec, codes: Codes, counts: Sequence[int], index: bool = False) -> int:
    """Bytes of the keys or values of a row with so many entries in each KV head."""
    streams: tuple[Tensor, ...] = codes.streams[:1] if index else codes.streams
    total = sum(counts) * sum(stream.shape[1] for stream in streams)
    if codes.scales is not None and (codec.index_scaled or not index):
        total += sum(counts) * codes.scales.shape[1] * codes.scales.itemsize
    if codes.groups is not None:
        total += sum(groups_of(tuple(counts), codec.group)) * codes.groups[0].nbytes
    return total
