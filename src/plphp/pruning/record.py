# SPDX-License-Identifier: Apache-2.0
"""What is noted down when a layer of a cache is compacted, before anyone asks for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans
from plphp.policy.allocation import RowAllocation

from .placement import LayerPlacement, Placement
from .report import ImageReport, LayerReport, PromptReport, RowReport


@dataclass(frozen=True)
class LayerRecord:
    """What a cache notes down when it compacts a layer; turned into a report only when one is asked for."""

    layer: int
    start: int
    spans: VisionSpans
    allocation: list[RowAllocation]
    kept_vision: Tensor
    evicted_text: Tensor | None = None

    @classmethod
    def of(cls, spans: VisionSpans, start: int, part: LayerPlacement) -> LayerRecord:
        """Note down what became of a layer's tail, which begins at the logical position ``start``."""
        scores, dropped = part.scores, part.placement == Placement.DROPPED
        evicted = None
        if scores.evictable is not None:
            evicted = (dropped & (scores.evictable & ~scores.vision)[:, None]).cpu()
        return cls(scores.layer, start, spans, part.allocation, (~dropped & scores.vision[:, None]).cpu(), evicted)

    @classmethod
    def stacked(cls, records: Sequence[LayerRecord], order: Sequence[int]) -> LayerRecord:
        """Put several records of the same layer and the same prompt of one row below each other, in a new order."""
        first = records[0]
        evicted = None
        if any(record.evicted_text is not None for record in records):
            texts = [
                torch.zeros_like(record.kept_vision) if record.evicted_text is None else record.evicted_text
                for record in records
            ]
            evicted = torch.cat(texts)[order]
        rows = [row for record in records for row in record.allocation]
        return cls(
            first.layer,
            first.start,
            first.spans.repeated(len(rows)),
            [rows[number] for number in order],
            torch.cat([record.kept_vision for record in records])[order],
            evicted,
        )

    def report(self) -> LayerReport:
        """Spell the masks out as positions."""
        tokens = self.spans.vision.sum(1).tolist()
        rows = [
            RowReport(
                vision_score=row.vision_score,
                layer_class=row.layer_class,
                rate=row.rate,
                vision_tokens=tokens[number],
                kept_positions=self._positions(self.kept_vision[number]),
                evicted_text=[] if self.evicted_text is None else self._positions(self.evicted_text[number]),
            )
            for number, row in enumerate(self.allocation)
        ]
        return LayerReport(self.layer, rows)

    def _positions(self, masks: Tensor) -> list[list[int]]:
        """Logical positions of a mask [kv_heads, seq] per head."""
        return [(mask.nonzero()[:, 0] + self.start).tolist() for mask in masks]


def prompt_reports(records: Sequence[LayerRecord]) -> list[PromptReport]:
    """Put the records of all layers and turns together, prompt by prompt, oldest first.

    Parameters
    ----------
    records : sequence of LayerRecord
        In the order in which they were noted down.
    """
    prompts: dict[int, list[LayerRecord]] = {}
    for record in records:
        prompts.setdefault(record.spans.start, []).append(record)
    return [
        PromptReport(
            start=start,
            end=layers[0].spans.end,
            images=_images(layers[0].spans),
            layers=[record.report() for record in sorted(layers, key=lambda record: record.layer)],
        )
        for start, layers in prompts.items()
    ]


def _images(spans: VisionSpans) -> list[list[ImageReport]]:
    result = []
    for row, grids in zip(spans.segment, spans.grids, strict=True):
        numbers = row[row >= 0].unique().tolist()
        result.append(
            [
                ImageReport((row == number).nonzero()[:, 0].tolist(), grids[number] if number < len(grids) else None)
                for number in numbers
            ]
        )
    return result
