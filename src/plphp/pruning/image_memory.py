# SPDX-License-Identifier: Apache-2.0
"""What layers hold of each image, worked out from their ledgers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plphp.kernels.coded_bytes import means_there, tier_nbytes
from plphp.settings.ladder import WHOLE

from .entries import LayerEntries
from .image_report import ImageMemory
from .image_table import ImageTable
from .ledger import codes_of
from .sources import sources_of


def image_memories(layers: Mapping[int, LayerEntries], images: ImageTable) -> list[ImageMemory]:
    """What layers hold of each image, by number."""
    numbered = images.numbered()
    most = max(1, *(len(own) for own in images.rows), 1)
    number_of = torch.full((len(images.rows), most), -1)
    for number, (row, place) in enumerate(numbered):
        number_of[row, place] = number
    entries: dict[str, Tensor] = {}
    nbytes = torch.zeros(len(numbered), dtype=torch.float64)
    held = [layer for layer in layers.values() if layer.ledger is not None]
    for layer in held:
        for name, own, weight in _counted(layer, images, number_of):
            counts = torch.bincount(own, minlength=len(numbered))
            entries[name] = entries.get(name, torch.zeros_like(counts)) + counts
            nbytes += torch.bincount(own, weights=weight, minlength=len(numbered))
    pairs = sum(layer.prefix.kv_heads for layer in held if layer.prefix is not None)
    per_token = sum(layer.entry_nbytes for layer in held)
    result = []
    for number, (row, place) in enumerate(numbered):
        image = images.rows[row][place]
        of_image = {name: int(counts[number]) for name, counts in entries.items() if counts[number]}
        tokens = len(image.positions)
        result.append(
            ImageMemory(
                number,
                row,
                image.turn,
                image.first,
                image.last,
                tokens,
                image.grid,
                image.forgotten,
                of_image,
                round(float(nbytes[number])),
                tokens * per_token,
                sum(of_image.values()) / (tokens * pairs) if pairs else 0.0,
                image.attention,
            )
        )
    return result


def _counted(layer: LayerEntries, images: ImageTable, number_of: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """By rung, the number of the image of each vision entry of a layer, and the bytes that the entry counts for."""
    whole, *tiers = sources_of(layer, images, shared=False)
    codes, result = codes_of(layer.coded), []
    number = number_of[whole.row, whole.image][whole.vision]
    result.append((WHOLE, number, torch.full(number.shape, float(layer.pair_nbytes), dtype=torch.float64)))
    for source in tiers:
        assert codes is not None
        block, tier = codes.block, codes.block.tiers[source.tier - 1]
        means = means_there(block)
        of_parts = []
        for stored in block.rows:
            count, total = sum(tier.counts[stored]), sum(block.held[stored])
            each = tier_nbytes(tier, stored) / max(1, count) + means / max(1, total)
            of_parts += [each] * count
        weight = torch.tensor(of_parts, dtype=torch.float64)
        result.append((tier.rung.name, number_of[source.row, source.image], weight))
    return result
