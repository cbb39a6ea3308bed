# SPDX-License-Identifier: Apache-2.0
"""Entries in few bits for models of random weights: random codebooks, random tiers, and layers filled with them; and a
query bank of random queries."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.rotation_probe import rotations_of
from plphp.kernels.books import CENTROIDS, COARSE_PART, PART, Books, LayerBooks
from plphp.kernels.codecs import Codes
from plphp.kernels.coded import CodedKV, Reading, Tier
from plphp.kernels.coder import Coder
from plphp.kernels.packed import PackedKV
from plphp.kernels.rungs import RUNGS
from plphp.policy.bank import LayerBank, QueryBank
from plphp.pruning.entries import LayerEntries
from plphp.pruning.placement import Placement
from plphp.settings.ladder import Ladder


@functools.lru_cache(maxsize=8)
def random_books(kv_heads: int, dim: int, device: torch.device) -> LayerBooks:
    """Codebooks of random centroids for keys and values that are normally distributed."""
    generator = torch.Generator().manual_seed(0)

    def centroids(channels: int, spread: float) -> Tensor:
        shape = (kv_heads, dim // channels, CENTROIDS, channels)
        return (spread * torch.randn(shape, generator=generator)).to(torch.float16).to(device)

    def side() -> Books:
        coarse = None if dim % COARSE_PART else centroids(COARSE_PART, 1.0)
        return Books(centroids(PART, 1.0), centroids(PART, 0.7), coarse)

    return LayerBooks(side(), side())


def random_coder(ladder: Ladder, read: float, kv_heads: int, dim: int, device: torch.device) -> Coder:
    """What holds the entries of a layer as a ladder says, with random codebooks where it needs any.

    Parameters
    ----------
    ladder : Ladder
        Of rungs of few bits alone.
    read : float
        Share of the coded entries that a step reads.
    kv_heads, dim, device
        Of the codebooks.
    """
    rungs = tuple(RUNGS[name] for name in ladder.names)
    needed = any(rung.needs_books for rung in rungs)
    return Coder(rungs, random_books(kv_heads, dim, device) if needed else None, Reading(read))


def random_placement(ladder: Ladder, vision: Tensor, kv_heads: int) -> Tensor:
    """Where the entries of a row go: text whole, and random vision entries of all heads together to each rung.

    Parameters
    ----------
    ladder : Ladder
        Its shares are what a layer holds in sum over the heads.
    vision : Tensor
        bool [1, seq].
    kv_heads : int

    Returns
    -------
    Tensor
        uint8 [1, kv_heads, seq], on the CPU.
    """
    entries = kv_heads * int(vision.sum())
    order = torch.randperm(entries, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([round(part * entries) for part in ladder.cumulative()])
    number = torch.bucketize(order, bounds, right=True) + 1
    placement = torch.full((1, kv_heads, vision.shape[1]), int(Placement.WHOLE), dtype=torch.uint8)
    placed = torch.where(number > len(bounds), int(Placement.DROPPED), number).to(torch.uint8)
    placement[vision[:, None].expand_as(placement)] = placed
    return placement


def coded_row(keys: Tensor, values: Tensor, vision: Tensor, ladder: Ladder, read: float) -> LayerEntries:
    """A prompt on a ladder, with random codebooks.

    Parameters
    ----------
    keys, values : Tensor
        [1, kv_heads, seq, dim].
    vision : Tensor
        bool [1, seq].
    ladder, read
        See `random_coder`.
    """
    device, heads = keys.device, keys.shape[1]
    row = LayerEntries()
    row.append(keys, values)
    row.compact(
        random_placement(ladder, vision, heads).to(device),
        coder=random_coder(ladder, read, heads, keys.shape[3], device),
        vision=vision.to(device),
    )
    return row


def fill(layer: LayerEntries, row: LayerEntries, batch: int) -> None:
    """Put copies of a coded row into an empty layer, in memory of their own: nothing is whole in the meantime."""
    assert row.prefix is not None
    blank = row.prefix.keys.new_empty(batch, row.prefix.kv_heads, 0, row.prefix.keys.shape[1])
    layer.begin(blank, blank)
    layer.prefix, layer.prefix_length = PackedKV.stacked([row.prefix] * batch), row.prefix_length
    layer.coded = tuple(stacked([block] * batch) for block in row.coded)


def stacked(blocks: Sequence[CodedKV]) -> CodedKV:
    """Put the rows of blocks with the same rungs below each other; each row of them is read as it is stored."""
    tiers = []
    for parts in zip(*(block.tiers for block in blocks), strict=True):
        counts = tuple(row for tier in parts for row in tier.counts)
        keys, values = Codes.joined([tier.keys for tier in parts]), Codes.joined([tier.values for tier in parts])
        tiers.append(Tier(parts[0].rung, keys, values, counts, tuple(range(len(counts)))))
    shared = zip(*((*block.means, block.rest_values) for block in blocks), strict=True)
    keys_mean, values_mean, rest = (None if own[0] is None else torch.cat(own) for own in shared)
    reading = tuple(own for block in blocks for own in block.reading)
    return CodedKV(tuple(tiers), keys_mean, values_mean, blocks[0].books, reading, rest)


def random_bank(model: Any, path: Path, samples: int = 400) -> str:
    """Write a query bank of a model, of random queries and codebooks, and return its path."""
    lease = Lease.of(model)
    rotations = rotations_of(lease.attachment)
    lease.end()
    text = model.config.get_text_config()
    dim = text.hidden_size // text.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    layers = {
        layer: LayerBank(torch.randn(text.num_attention_heads, samples, dim, generator=generator), rotation)
        for layer, rotation in rotations.items()
    }
    sizes = text.num_key_value_heads, dim, torch.device("cpu")
    books = {layer: random_books.__wrapped__(*sizes) for layer in layers}  # a file takes no tensor twice
    QueryBank(layers, torch.arange(samples), {"decoder_layers": text.num_hidden_layers}, books).save(path)
    return str(path)
