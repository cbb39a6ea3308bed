# SPDX-License-Identifier: Apache-2.0
"""Records of placed prompts, brought up to what is held of them now that images have faded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plphp.kernels.coded import ALL
from plphp.kernels.coded_bytes import means_there
from plphp.kernels.coder import Coder

from .entries import LayerEntries
from .image_table import ImageTable
from .ledger import codes_of
from .placement import Placement
from .record import LayerRecord
from .sources import Source, sources_of


def records_now(
    records: Sequence[LayerRecord], layers: Mapping[int, LayerEntries], images: ImageTable
) -> list[LayerRecord]:
    """Records of layers with a ledger; those of other rows than the layers have now are as they were."""
    sources = {
        number: [_ByPrompt(source) for source in sources_of(layer, images, shared=False)]
        for number, layer in layers.items()
        if layer.ledger is not None
    }
    return [
        _now(record, layers[record.layer], sources[record.layer])
        if record.layer in sources and len(record.allocation) == layers[record.layer].batch_size
        else record
        for record in records
    ]


class _ByPrompt:
    """The vision entries of one place of a layer in the order of their prompts: there may be hundreds of records."""

    def __init__(self, source: Source) -> None:
        self._source = source
        order = source.prompt.argsort(stable=True)
        self._prompts = source.prompt[order].contiguous()
        self._where = source.row[order], source.head[order], source.labels.position[order]

    @property
    def value(self) -> int:
        """How a placement names the place."""
        return self._source.tier or int(Placement.WHOLE)

    def of(self, prompt: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, head and position of each entry of a prompt."""
        first, last = torch.searchsorted(self._prompts, torch.tensor([prompt, prompt + 1])).tolist()
        row, head, position = self._where
        return row[first:last], head[first:last], position[first:last]


def _now(record: LayerRecord, layer: LayerEntries, sources: Sequence[_ByPrompt]) -> LayerRecord:
    codes = codes_of(layer.coded)
    placement = torch.full_like(record.kept_vision, int(Placement.DROPPED), dtype=torch.uint8)
    for source in sources:
        row, head, position = source.of(record.spans.start)
        placement[row, head, position - record.start] = source.value
    kept = placement != Placement.DROPPED
    if codes is None:
        return replace(record, kept_vision=kept, placement=None)
    # Beams share what is stored of a part.
    readings = {row: codes.block.reading[stored] for row, stored in zip(codes.owners, codes.block.rows, strict=True)}
    rungs = tuple(tier.rung for tier in codes.block.tiers)
    coders: list[Coder | None] = [
        Coder(rungs, codes.block.books, readings.get(row, ALL)) for row in range(len(record.allocation))
    ]
    means = means_there(codes.block)
    return replace(record, kept_vision=kept, placement=placement, coders=coders, means_bytes=means)
