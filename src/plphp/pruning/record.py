# SPDX-License-Identifier: Apache-2.0
"""What is noted down when a layer of a cache is compacted, before anyone asks for a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.families.prompt_spans import PromptSpans
from plphp.families.spans import VisionSpans
from plphp.kernels.coded_bytes import head_nbytes, means_of_shape
from plphp.kernels.coder import Coder
from plphp.policy.allocation import RowAllocation

from .entries import LayerEntries
from .left_tokens import AttendedTokens, LeftTokens
from .placement import LayerPlacement, Placement, coded_somewhere, whole_or_dropped
from .prompt_report import ImageReport, LayerReport, PromptReport, RowReport
from .tail_tokens import TailTokens
from .tier_report import TierReport


@dataclass(frozen=True)
class LayerRecord:
    """What a cache notes down when it compacts a layer; turned into a report only when one is asked for.

    Parameters
    ----------
    layer : int
        Decoder layer.
    start : int
        Logical position of the first token of the prompt.
    spans : PromptSpans
        Where its images are.
    allocation : list of RowAllocation
        Per row, what was decided at the layer level.
    kept_vision : Tensor
        bool [batch, kv_heads, seq]; the vision tokens that are held, whole or in few bits.
    evicted_text : Tensor, optional
        bool [batch, kv_heads, seq]; the text that left.
    placement : Tensor, optional
        uint8 [batch, kv_heads, seq], see `plphp.pruning.placement.Placement`; where something is held in few bits.
    coders : list of Coder or None
        Per row, what holds it in few bits.
    means_bytes : int, optional
        Bytes of the means of a row, where they are not those that its rungs need.
    """

    layer: int
    start: int
    spans: PromptSpans
    allocation: list[RowAllocation]
    kept_vision: Tensor
    evicted_text: Tensor | None
    placement: Tensor | None
    coders: list[Coder | None]
    means_bytes: int | None = None

    @classmethod
    def of(
        cls, spans: VisionSpans, tokens: TailTokens, part: LayerPlacement, coders: Sequence[Coder | None] | None = None
    ) -> LayerRecord:
        """Note down what became of a layer's tail.

        ``coders`` are those of the rows; default: that of the layer for all of them.
        """
        scores, dropped = part.scores, part.placement == Placement.DROPPED
        evicted = None
        if scores.evictable is not None:
            evicted = tokens.spread((dropped & (scores.evictable & ~scores.vision)[:, None]).cpu(), False)
        kept = tokens.spread((~dropped & scores.vision[:, None]).cpu(), False)
        placement = None
        if coded_somewhere(part.placement):
            placement = tokens.spread(part.placement.cpu(), int(Placement.DROPPED))
        own = [part.coder] * len(kept) if coders is None else list(coders)
        return cls(scores.layer, tokens.begin, spans.own, part.allocation, kept, evicted, placement, own)

    @classmethod
    def stacked(cls, records: Sequence[LayerRecord], order: Sequence[int]) -> LayerRecord:
        """Put several records of the same layer and the same prompt of one row below each other, in a new order."""
        first = records[0]
        evicted = placement = None
        if any(record.placement is not None for record in records):
            # Without few bits it does not matter of what is held: that is held whole.
            placed = [
                whole_or_dropped(record.kept_vision) if record.placement is None else record.placement
                for record in records
            ]
            placement = torch.cat(placed)[order]
        if any(record.evicted_text is not None for record in records):
            texts = [
                torch.zeros_like(record.kept_vision) if record.evicted_text is None else record.evicted_text
                for record in records
            ]
            evicted = torch.cat(texts)[order]
        rows = [row for record in records for row in record.allocation]
        coders = [coder for record in records for coder in record.coders]
        return cls(
            first.layer,
            first.start,
            first.spans.repeated(len(rows)),
            [rows[number] for number in order],
            torch.cat([record.kept_vision for record in records])[order],
            evicted,
            placement,
            [coders[number] for number in order],
        )

    def report(self, entries: LayerEntries) -> LayerReport:
        """Spell the masks out as positions, and count the bytes that they take in a layer of this shape."""
        tokens = self.spans.vision.sum(1).tolist()
        rows = [
            RowReport(
                vision_score=row.vision_score,
                layer_class=row.layer_class,
                rate=row.rate,
                vision_tokens=tokens[number],
                kept_positions=self._positions(self.kept_vision[number]),
                evicted_text=[] if self.evicted_text is None else self._positions(self.evicted_text[number]),
                entry_bytes=entries.pair_nbytes,
                **self._in_few_bits(number, entries.dims),
            )
            for number, row in enumerate(self.allocation)
        ]
        return LayerReport(self.layer, rows)

    def _in_few_bits(self, row: int, dims: tuple[int, int]) -> dict[str, Any]:
        """What a `RowReport` says of what is held in few bits."""
        coder = self.coders[row]
        if self.placement is None or coder is None:
            return {}
        tiers, rungs = [], []
        for number, rung in enumerate(coder.rungs, 1):
            mask = self.placement[row] == number
            counts = mask.sum(1).tolist()
            if any(counts):
                nbytes = [head_nbytes(rung, count, *dims) for count in counts]
                tiers.append(TierReport(rung.name, self._positions(mask), nbytes))
                rungs.append(rung)
        means = len(self.placement[row]) * means_of_shape(rungs, coder.reading, *dims) if rungs else 0
        if rungs and self.means_bytes is not None:
            means = self.means_bytes
        return {"tiers": tiers, "means_bytes": means}

    def _positions(self, masks: Tensor) -> list[list[int]]:
        """Logical positions of a mask [kv_heads, seq] per head."""
        return [(mask.nonzero()[:, 0] + self.start).tolist() for mask in masks]


def prompt_reports(
    records: Sequence[LayerRecord],
    layers: Mapping[int, LayerEntries],
    left: Mapping[int, LeftTokens] | None = None,
    attended: Mapping[int, AttendedTokens] | None = None,
) -> list[PromptReport]:
    """Put the records of all layers and turns together, prompt by prompt, oldest first.

    Parameters
    ----------
    records : sequence of LayerRecord
        In the order in which they were noted down.
    layers : mapping of int to LayerEntries
        The layers that they are of.
    left : mapping of int to LeftTokens, optional
        By the beginning of the prompts, what left them before layers got it.
    attended : mapping of int to AttendedTokens, optional
        By the beginning of the prompts, what attended in their layers.
    """
    left, attended = left or {}, attended or {}
    prompts: dict[int, list[LayerRecord]] = {}
    for record in records:
        prompts.setdefault(record.spans.start, []).append(record)
    return [
        PromptReport(
            start=start,
            end=own[0].spans.end,
            images=_images(own[0].spans),
            layers=[record.report(layers[record.layer]) for record in sorted(own, key=lambda record: record.layer)],
            stages=left[start].report(own[0].spans) if start in left else [],
            computed=[tokens for _, tokens in sorted(left[start].computed.items())] if start in left else [],
            attention=attended[start].report(own[0].spans) if start in attended else [],
        )
        for start, own in prompts.items()
    ]


def _images(spans: PromptSpans) -> list[list[ImageReport]]:
    result = []
    for row, grids in zip(spans.segment, spans.grids, strict=True):
        numbers = row[row >= 0].unique().tolist()
        result.append(
            [
                ImageReport(
                    ((row == number).nonzero()[:, 0] + spans.start).tolist(),
                    grids[number] if number < len(grids) else None,
                )
                for number in numbers
            ]
        )
    return result
