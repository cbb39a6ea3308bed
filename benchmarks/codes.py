# SPDX-License-Identifier: Apache-2.0
"""Entries in few bits for models of random weights: random codebooks, random tiers, and layers filled with them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from plphp.kernels.books import CENTROIDS, COARSE_PART, PART, Books, LayerBooks
from plphp.kernels.codecs import Codes
from plphp.kernels.coded import CodedKV, Reading, Tier
from plphp.kernels.coder import Coder
from plphp.kernels.packed import PackedKV
from plphp.kernels.rungs import RUNGS
from plphp.pruning.entries import LayerEntries
from plphp.pruning.placement import Placement
from plphp.settings.ladder import Ladder


@functools.lru_cache(maxsize=256)
def random_books(layer: int, kv_heads: int, dim: int, device: torch.device) -> LayerBooks:
    """Codebooks of random centroids for keys and values that are normally distributed."""
    generator = torch.Generator().manual_seed(layer)

    def centroids(channels: int, spread: float) -> Tensor:
        shape = (kv_heads, dim // channels, CENTROIDS, channels)
        return (spread * torch.randn(shape, generator=generator)).to(torch.float16).to(device)

    def side() -> Books:
        coarse = None if dim % COARSE_PART else centroids(COARSE_PART, 1.0)
        return Books(centroids(PART, 1.0), centroids(PART, 0.7), coarse)

    return LayerBooks(side(), side())


def random_coder(ladder: Ladder, read: float, layer: int, kv_heads: int, dim: int, device: torch.device) -> Coder:
    """What holds the entries of a layer as a ladder says, with random codebooks where it needs any.

    Parameters
    ----------
    ladder : Ladder
        Of rungs of few bits alone.
    read : float
        Share of the coded entries that a step reads.
    layer, kv_heads, dim, device
        Of the codebooks.
    """
    rungs = tuple(RUNGS[name] for name in ladder.names)
    needed = any(rung.needs_books for rung in rungs)
    return Coder(rungs, random_books(layer, kv_heads, dim, device) if needed else None, Reading(read))


def random_placement(ladder: Ladder, vision: Tensor, kv_heads: int, seed: int) -> Tensor:
    """Where the entries of a layer go: text whole, and of every head a random part of the vision tokens to each rung.

    Parameters
    ----------
    ladder : Ladder
        Its shares are what each head holds.
    vision : Tensor
        bool [batch, seq]; as many vision tokens in every row.
    kv_heads, seed : int

    Returns
    -------
    Tensor
        uint8 [batch, kv_heads, seq], on the CPU.
    """
    batch, tokens = len(vision), int(vision[0].sum())
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, kv_heads, tokens, generator=generator).argsort(-1)
    bounds = torch.tensor([round(part * tokens) for part in ladder.cumulative()])
    number = torch.bucketize(order, bounds, right=True) + 1
    placed = torch.where(number > len(bounds), int(Placement.DROPPED), number).to(torch.uint8)
    placement = torch.full((batch, kv_heads, vision.shape[1]), int(Placement.WHOLE), dtype=torch.uint8)
    placement[vision[:, None].expand_as(placement)] = placed.flatten()
    return placement


def fill(
    layer: LayerEntries, rows: Iterable[tuple[Tensor, Tensor]], vision: Tensor, coder: Coder, placement: Tensor
) -> None:
    """Compact a prompt into a layer, a row at a time: keys and values of one row alone are whole at once.

    Parameters
    ----------
    layer : LayerEntries
        Without any entries.
    rows : iterable of tuple of Tensor
        Keys and values of each row, [1, kv_heads, seq, dim].
    vision : Tensor
        bool [batch, seq].
    coder : Coder
    placement : Tensor
        uint8 [batch, kv_heads, seq].
    """
    prefixes: list[PackedKV] = []
    blocks: list[CodedKV] = []
    for number, (keys, values) in enumerate(rows):
        own = LayerEntries()
        own.append(keys, values)
        row = slice(number, number + 1)
        own.compact(placement[row].to(keys.device), coder=coder, vision=vision[row].to(keys.device))
        assert own.prefix is not None
        prefixes.append(own.prefix)
        blocks += own.coded
    length = keys.shape[2]
    layer.begin(keys, values)
    layer.prefix, layer.prefix_length = PackedKV.stacked(prefixes), length
    del prefixes
    layer.coded = (stacked(blocks),)


def stacked(blocks: Sequence[CodedKV]) -> CodedKV:
    """Put the rows of blocks with the same rungs below each other; each row of them is read as it is stored."""
    tiers = []
    for parts in zip(*(block.tiers for block in blocks), strict=True):
        counts = tuple(row for tier in parts for row in tier.counts)
        keys, values = Codes.joined([tier.keys for tier in parts]), Codes.joined([tier.values for tier in parts])
        tiers.append(Tier(parts[0].rung, keys, values, counts, tuple(range(len(counts)))))
    means = [None if own[0] is None else torch.cat(own) for own in zip(*(b.means for b in blocks), strict=True)]
    reading = tuple(own for block in blocks for own in block.reading)
    return CodedKV(tuple(tiers), means[0], means[1], blocks[0].books, reading)
