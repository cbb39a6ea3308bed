# SPDX-License-Identifier: Apache-2.0
"""What a layer holds, place by place, as tensors of rows, heads, tokens and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .entries import LayerEntries
from .fading_plan import STAYS
from .image_table import ImageTable
from .ledger import Labels, codes_of

ROWS = 2**40
"""More than any logical position."""


def part_key(row: Tensor, prompt: Tensor) -> Tensor:
    """The row of entries, and the beginning of their prompt, in one number: the part that their codes are in."""
    return row * ROWS + prompt


@dataclass(frozen=True)
class Source:
    """Entries that lie in one place of a layer, with what becomes of them.

    Parameters
    ----------
    tier : int
        0 for those that are whole, text among them; from 1 the number of the tier.
    labels : Labels
        Their tokens.
    row, head : Tensor
        int64 [entries].
    image : Tensor
        int64 [entries]; the place of the image in its row, -1 for text.
    prompt : Tensor
        int64 [entries]; logical position at which the prompt of the image begins.
    targets : Tensor
        int64 [entries], see `plphp.pruning.fading_plan`.
    """

    tier: int
    labels: Labels
    row: Tensor
    head: Tensor
    image: Tensor
    prompt: Tensor
    targets: Tensor

    @classmethod
    def of(cls, tier: int, labels: Labels, owners: Tensor, images: ImageTable) -> Source:
        """Entries that all stay where they are; ``owners`` is the row of the batch of each of their rows, int64."""
        pair, heads = labels.block.pairs(), labels.block.kv_heads
        row = owners[pair // heads]
        image = images.of_tokens(row, labels.position)
        prompt = images.prompts_of(row, image)
        return cls(tier, labels, row, pair % heads, image, prompt, torch.full_like(row, STAYS))

    @property
    def vision(self) -> Tensor:
        """bool [entries]; whether they are of an image."""
        return self.image >= 0

    @property
    def coded(self) -> Tensor:
        """bool [entries]; whether they are in few bits once they have moved."""
        return (self.targets > 0) | ((self.targets == STAYS) & (self.tier > 0))

    def with_targets(self, targets: Tensor) -> Source:
        """The same with other targets."""
        return replace(self, targets=targets)


def whole_source(layer: LayerEntries, images: ImageTable, *, shared: bool = True) -> Source:
    """What a layer with a ledger holds whole, see `sources_of`."""
    assert layer.ledger is not None
    whole = layer.ledger.whole if shared else layer.ledger.whole.unshared()
    return Source.of(0, whole, _readers(whole, range(whole.block.batch)), images)


def sources_of(layer: LayerEntries, images: ImageTable, *, shared: bool = True) -> list[Source]:
    """What a layer with a ledger holds: its prefix, and tier by tier.

    Entries that rows share are of one of these rows, or without ``shared`` of each of them.
    """
    assert layer.ledger is not None
    sources = [whole_source(layer, images, shared=shared)]
    codes = codes_of(layer.coded)
    if codes is not None:
        for number, labels in enumerate(layer.ledger.coded, 1):
            labels = labels if shared else labels.unshared()
            sources.append(Source.of(number, labels, _readers(labels, codes.owners), images))
    return sources


def unshare(layer: LayerEntries) -> None:
    """Give every row of a layer with a ledger entries of its own, where rows share them."""
    assert layer.prefix is not None
    assert layer.ledger is not None
    ledger, codes = layer.ledger, codes_of(layer.coded)
    layer.prefix = layer.prefix.unshared()
    if codes is not None:
        layer.coded = (codes.unshared(),)
    layer.ledger = replace(
        ledger, whole=ledger.whole.unshared(), coded=tuple(labels.unshared() for labels in ledger.coded)
    )


def _readers(labels: Labels, owners: Sequence[int]) -> Tensor:
    """For each stored row, a row of the batch that reads it, int64; ``owners`` are those of the rows of the labels."""
    reader = dict(reversed(list(zip(labels.block.rows, owners, strict=True))))
    return torch.tensor([reader[stored] for stored in range(len(labels.block.counts))])
