# SPDX-License-Identifier: Apache-2.0
"""What was kept and what was evicted, per prompt, layer, row and KV head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plphp.io.json_files import Kind, from_json, to_json

from .stage_report import StageReport
from .tier_report import LayerBytes, RungBytes, TierReport

KIND = Kind("report", "`plphp generate --report`", 1)
NUMBERS = ("batch", "tokens", "kv_bytes_full", "kv_bytes", "reserved_bytes", "pruning_seconds", "book_bytes")


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
        What left before layers got it, in their order.
    computed : list of int
        By decoder layer, the tokens that it computed, without padding; empty where that was all.
    """

    start: int
    end: int
    images: list[list[ImageReport]]
    layers: list[LayerReport]
    stages: list[StageReport] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BankProgress:
    """How far a query bank is that the engine collects by itself.

    Parameters
    ----------
    collected : int
        Prompts whose answers it is of.
    wanted : int
        Prompts that make it complete.
    """

    collected: int
    wanted: int

    @property
    def missing(self) -> int:
        """Prompts that are still to be answered unpruned."""
        return max(0, self.wanted - self.collected)


@dataclass(frozen=True)
class PruneReport:
    """What a `PrunedCache` kept.

    Parameters
    ----------
    model_type, model_class : str
        The model.
    config : dict
        Settings, as `PLPHPConfig.to_dict`.
    batch : int
        Rows of the cache.
    tokens : int
        Tokens seen, per row, evicted ones and padding included.
    kv_bytes_full : int
        Bytes that an unpruned dynamic cache would hold for these tokens.
    kv_bytes : int
        Bytes of the live tensors that hold keys and values, whole and in few bits, reserved room included.
    reserved_bytes : int
        Those of them that hold no entry: room for tokens to come.
    pruning_seconds : float
        Time spent on scoring, allocation, selection and compaction (host time; on a GPU without waiting for it).
    prompts : list of PromptReport
        The pruned prompts, oldest first.
    collecting : BankProgress, optional
        Set where nothing was evicted because the method has no query bank yet: how far its collection was when the
        answer had ended. The answer is among the prompts that were collected unless it counts for nothing, as where the
        bank was completed by others meanwhile.
    held : list of LayerBytes
        By layer, the live tensors: ``kv_bytes`` are the sum. Empty in reports of earlier versions.
    book_bytes : int
        Bytes of the codebooks that the layers read. They belong to the model, whatever the number of caches, and are no
        part of ``kv_bytes``.
    """

    model_type: str
    model_class: str
    config: dict[str, Any]
    batch: int
    tokens: int
    kv_bytes_full: int
    kv_bytes: int
    reserved_bytes: int
    pruning_seconds: float
    prompts: list[PromptReport]
    collecting: BankProgress | None = None
    held: list[LayerBytes] = field(default_factory=list)
    book_bytes: int = 0

    @property
    def entry_bytes(self) -> int:
        """Bytes of the entries held, of vision tokens, text and answer: ``kv_bytes`` without the reserved room."""
        return self.kv_bytes - self.reserved_bytes

    @property
    def kv_reduction(self) -> float:
        """Fraction of the bytes of a full cache's entries that is gone; 0 where nothing was evicted."""
        return 1 - self.entry_bytes / self.kv_bytes_full if self.kv_bytes_full else 0.0

    @property
    def read_bytes(self) -> int:
        """Bytes that a decoding step reads at most of the cache as it is now, codebooks aside.

        In reports of earlier versions `entry_bytes`.
        """
        return sum(layer.read for layer in self.held) if self.held else self.entry_bytes

    @property
    def device_bytes(self) -> dict[str, int]:
        """By device, its part of ``kv_bytes``; empty in reports of earlier versions."""
        devices = dict.fromkeys(layer.device for layer in self.held if layer.nbytes)
        return {name: sum(layer.nbytes for layer in self.held if layer.device == name) for name in devices}

    @property
    def rung_bytes(self) -> dict[str, int]:
        """By the name of a rung, the bytes of what layers hold in it now, without means."""
        total: dict[str, int] = {}
        for rung in (rung for layer in self.held for rung in layer.rungs):
            total[rung.rung] = total.get(rung.rung, 0) + rung.nbytes
        return total

    @property
    def text_evicted(self) -> int:
        """Text entries evicted, over prompts, layers, rows and heads."""
        return sum(len(head) for row in self._rows for head in row.evicted_text)

    @property
    def retention(self) -> float:
        """Vision entries held, whole or in few bits, as a fraction of all, over prompts, layers, rows and heads; 1 if
        there are none."""
        total = sum(row.vision_tokens * len(row.kept) for row in self._rows)
        return sum(sum(row.kept) for row in self._rows) / total if total else 1.0

    @property
    def vision_held(self) -> float:
        """Bytes of the vision tokens, as a fraction of those of all of them held whole, over prompts, layers, rows and
        heads; 1 if there are none. Without few bits, `retention`."""
        full = sum(row.entry_bytes * row.vision_tokens * len(row.kept) for row in self._rows)
        return sum(row.vision_bytes for row in self._rows) / full if full else self.retention

    @property
    def _rows(self) -> list[RowReport]:
        return [row for prompt in self.prompts for layer in prompt.layers for row in layer.rows]

    def to_json(self, path: str | Path | None = None, *, indent: int | None = None) -> str:
        """Return the report as JSON, and write it to ``path`` if one is given."""
        return to_json(dataclasses.asdict(self), KIND, path, indent)

    @classmethod
    def from_json(cls, source: str | Path) -> PruneReport:
        """Read a report from a file (a `Path`) or from JSON text (a `str`).

        Raises
        ------
        ConfigError
            If it is not a report of this version's format.
        """
        return from_json(source, KIND, _read_report)


def _read_report(values: dict[str, Any]) -> PruneReport:
    prompts = [_read_prompt(prompt) for prompt in values.pop("prompts")]
    collecting = values.pop("collecting", None)
    progress = None if collecting is None else BankProgress(**collecting)
    held = [_read_layer_bytes(layer) for layer in values.pop("held", [])]
    report = PruneReport(prompts=prompts, collecting=progress, held=held, **values)
    _check_numbers(report, NUMBERS)
    if progress is not None:
        _check_numbers(progress, ("collected", "wanted"))
    return report


def _check_numbers(report: object, names: tuple[str, ...]) -> None:
    """Raise TypeError where a field of a report that was read is no number."""
    for name in names:
        value = getattr(report, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")


def _integers(values: Any, name: str) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"{name} must be a list of integers, got {values!r:.60}")
    return values


def _read_row(values: dict[str, Any]) -> RowReport:
    row = RowReport(**values)
    _check_numbers(row, ("vision_score", "rate", "vision_tokens", "entry_bytes", "means_bytes"))
    return dataclasses.replace(
        row,
        kept_positions=[_integers(head, "positions") for head in row.kept_positions],
        evicted_text=[_integers(head, "positions") for head in row.evicted_text],
        tiers=[_read_tier(tier) for tier in values.get("tiers", [])],
    )


def _read_tier(values: dict[str, Any]) -> TierReport:
    return TierReport(
        values["rung"],
        [_integers(head, "positions") for head in values["positions"]],
        _integers(values["nbytes"], "nbytes"),
    )


def _read_layer_bytes(values: dict[str, Any]) -> LayerBytes:
    rungs = [
        RungBytes(**{**rung, "entries": _integers(rung["entries"], "entries")}) for rung in values.pop("rungs", [])
    ]
    layer = LayerBytes(rungs=rungs, **values)
    _check_numbers(layer, ("layer", "whole", "tail", "reserved", "means", "other", "read"))
    for rung in rungs:
        _check_numbers(rung, ("codes", "scales", "groups"))
    return layer


def _read_prompt(values: dict[str, Any]) -> PromptReport:
    return PromptReport(
        start=values["start"],
        end=values["end"],
        images=[
            [
                ImageReport(_integers(image["positions"], "positions"), tuple(image["grid"]) if image["grid"] else None)
                for image in row
            ]
            for row in values["images"]
        ],
        layers=[LayerReport(layer["layer"], [_read_row(row) for row in layer["rows"]]) for layer in values["layers"]],
        stages=[StageReport.from_values(stage) for stage in values.get("stages", [])],
        computed=_integers(values.get("computed", []), "computed"),
    )
