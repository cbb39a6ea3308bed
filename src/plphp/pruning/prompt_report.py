# SPDX-License-Identifier: Apache-2.0
"""What was kept of one prompt, per layer, row and KV head, and what left it before layers got it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .report_checks import check_numbers, integers
from .stage_report import AttentionReport, StageReport
from .tier_report import TierReport


@dataclass(frozen=True)
class ImageReport:
    """One image of a prompt.

    Parameters
    ----------
    positions : list of int
        Logical positions of its vision tokens.
    grid : tuple of int, optional
        ``(frames, height, width)`` in tokens.
    """

    positions: list[int]
    grid: tuple[int, int, int] | None


@dataclass(frozen=True)
class RowReport:
    """What one layer kept of one row.

    Parameters
    ----------
    vision_score : float
        Vision attention score gamma, in [0, 1]; 0 where it is not finite.
    layer_class : str
        "attentive", "balanced", "indifferent", "uniform", "exempt", "no-vision", or "non-finite" where the attention
        of the row is NaN or inf, so that nothing of it was evicted.
    rate : float
        Retention rate, in [0, 1].
    vision_tokens : int
        Vision tokens of the prompt.
    kept_positions : list of list of int
        Per KV head, the logical positions of the vision tokens that are held, whole or in few bits.
    evicted_text : list of list of int
        Per KV head, the logical positions of the text tokens that were evicted; empty for methods that keep all.
    entry_bytes : int
        Bytes that the key and the value of a token take in a KV head, held whole; 0 in reports of earlier versions.
    tiers : list of TierReport
        What of the vision tokens is held in few bits, rung by rung, the best first.
    means_bytes : int
        Bytes of the means that the rungs share.
    """

    vision_score: float
    layer_class: str
    rate: float
    vision_tokens: int
    kept_positions: list[list[int]]
    evicted_text: list[list[int]] = field(default_factory=list)
    entry_bytes: int = 0
    tiers: list[TierReport] = field(default_factory=list)
    means_bytes: int = 0

    @property
    def kept(self) -> list[int]:
        """Vision tokens held per KV head, whole or in few bits."""
        return [len(positions) for positions in self.kept_positions]

    @property
    def vision_kept(self) -> float:
        """Vision entries kept, as a fraction of all: above ``rate`` where text left instead. 1 without any."""
        total = self.vision_tokens * len(self.kept_positions)
        return sum(self.kept) / total if total else 1.0

    @property
    def whole(self) -> list[int]:
        """Vision tokens held whole per KV head."""
        coded = [sum(tier.entries[head] for tier in self.tiers) for head in range(len(self.kept_positions))]
        return [kept - few for kept, few in zip(self.kept, coded, strict=True)]

    @property
    def vision_bytes(self) -> int:
        """Bytes that hold the vision tokens."""
        coded = self.means_bytes + sum(sum(tier.nbytes) for tier in self.tiers)
        return self.entry_bytes * sum(self.whole) + coded

    @property
    def vision_held(self) -> float:
        """`vision_bytes` as a fraction of those of all vision tokens held whole; 1 without any."""
        full = self.entry_bytes * self.vision_tokens * len(self.kept_positions)
        # Reports of earlier versions know nothing of few bits: there entries are bytes.
        return self.vision_bytes / full if full else self.vision_kept


@dataclass(frozen=True)
class LayerReport:
    """What one layer kept, per row of the batch."""

    layer: int
    rows: list[RowReport]


@dataclass(frozen=True)
class PromptReport:
    """One prompt (a turn of a chat) that was pruned.

    Parameters
    ----------
    start, end : int
        Logical positions of the prompt, first and after the last.
    images : list of list of ImageReport
        Per row, its images.
    layers : list of LayerReport
        The pruned layers.
    stages : list of StageReport
        What left before layers got it, in the order of the layers; empty for methods of the KV cache.
    computed : list of int
        By decoder layer, the tokens that it computed, over the rows and without padding; empty where that was all.
    attention : list of AttentionReport
        What attended in each layer whose attention of the prompt ran among important tokens alone.
    """

    start: int
    end: int
    images: list[list[ImageReport]]
    layers: list[LayerReport]
    stages: list[StageReport] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    attention: list[AttentionReport] = field(default_factory=list)

    @property
    def all_computed(self) -> int:
        """Tokens x layers of the prompt, had nothing left before layers got it; 0 where `computed` is empty."""
        if not self.computed:
            return 0
        before = sum(sum(stage.tokens_in) - sum(stage.tokens_out) for stage in self.stages if stage.layer == 0)
        return len(self.computed) * (self.computed[0] + before)

    @property
    def computed_share(self) -> float:
        """Tokens x layers that were computed, as a fraction of `all_computed`; 1 where that was all."""
        return sum(self.computed) / self.all_computed if self.computed else 1.0

    @property
    def attended(self) -> int:
        """Tokens x layers that attended, in the layers of `attention` and over the rows."""
        return sum(sum(layer.attended) for layer in self.attention)

    @property
    def attention_computed(self) -> int:
        """Tokens x layers that those layers computed."""
        return sum(sum(layer.computed) for layer in self.attention)

    @property
    def attended_share(self) -> float:
        """Tokens x layers that attended, as a fraction of `attention_computed`; 1 where attention was the model's."""
        return self.attended / self.attention_computed if self.attention else 1.0


def _positions(values: Any) -> list[int]:
    return integers(values, "positions")


def _read_row(values: dict[str, Any]) -> RowReport:
    row = RowReport(**values)
    check_numbers(row, ("vision_score", "rate", "vision_tokens", "entry_bytes", "means_bytes"))
    return dataclasses.replace(
        row,
        kept_positions=[_positions(head) for head in row.kept_positions],
        evicted_text=[_positions(head) for head in row.evicted_text],
        tiers=[_read_tier(tier) for tier in values.get("tiers", [])],
    )


def _read_tier(values: dict[str, Any]) -> TierReport:
    return TierReport(
        values["rung"], [_positions(head) for head in values["positions"]], integers(values["nbytes"], "nbytes")
    )


def read_prompt(values: dict[str, Any]) -> PromptReport:
    return PromptReport(
        start=values["start"],
        end=values["end"],
        images=[
            [
                ImageReport(_positions(image["positions"]), tuple(image["grid"]) if image["grid"] else None)
                for image in row
            ]
            for row in values["images"]
        ],
        layers=[LayerReport(layer["layer"], [_read_row(row) for row in layer["rows"]]) for layer in values["layers"]],
        stages=[StageReport.from_values(stage) for stage in values.get("stages", [])],
        computed=integers(values.get("computed", []), "computed"),
        attention=[AttentionReport.from_values(layer) for layer in values.get("attention", [])],
    )
