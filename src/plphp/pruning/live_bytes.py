# SPDX-License-Identifier: Apache-2.0
"""The bytes of the live tensors of a layer, by what they hold."""

from __future__ import annotations

from collections.abc import Iterable

from plphp.kernels.coded import CodedKV, Tier
from plphp.kernels.coded_bytes import read_nbytes
from plphp.kernels.prompt_codes import plain

from .entries import LayerEntries
from .tier_report import LayerBytes, RungBytes


def layer_bytes(number: int, layer: LayerEntries) -> LayerBytes:
    """What decoder layer ``number`` holds now, and what a decoding step reads of it at most."""
    coded = sum(block.nbytes for block in layer.coded)
    prefix = layer.prefix
    packed = layer.provisional_nbytes if prefix is None else prefix.nbytes + layer.provisional_nbytes
    tail = layer.nbytes - layer.reserved_nbytes - packed - coded
    read: float = tail
    if prefix is not None:
        read += sum(prefix.pair_counts) * layer.pair_nbytes
    blocks = plain(layer.coded)
    read += sum(read_nbytes(block, row) for block in blocks for row in range(block.batch))
    device = "" if layer.nbytes == 0 else str(_device(layer))
    return LayerBytes(
        number,
        device,
        whole=packed,
        tail=tail,
        reserved=layer.reserved_nbytes,
        means=sum(block.means_nbytes for block in blocks),
        rungs=_rungs(blocks),
        read=round(read),
    )


def books_nbytes(layers: Iterable[LayerEntries]) -> int:
    """Bytes of the codebooks that some layers read; a set that several read counts once."""
    blocks = (block for layer in layers for block in plain(layer.coded))
    books = {id(block.books): block.books for block in blocks if block.books is not None}
    return sum(own.nbytes for own in books.values())


def _rungs(blocks: Iterable[CodedKV]) -> list[RungBytes]:
    tiers: dict[str, list[Tier]] = {}
    for block in blocks:
        for tier in block.tiers:
            tiers.setdefault(tier.rung.name, []).append(tier)
    return [_of_rung(name, own) for name, own in tiers.items()]


def _of_rung(name: str, tiers: list[Tier]) -> RungBytes:
    codes = [side for tier in tiers for side in (tier.keys, tier.values)]
    return RungBytes(
        name,
        [sum(counts) for counts in zip(*(row for tier in tiers for row in tier.counts), strict=True)],
        sum(stream.nbytes for own in codes for stream in own.streams),
        sum(own.scales.nbytes for own in codes if own.scales is not None),
        sum(own.groups.nbytes for own in codes if own.groups is not None),
    )


def _device(layer: LayerEntries) -> object:
    return layer.keys.device if layer.keys is not None else layer.prefix.device if layer.prefix is not None else ""
