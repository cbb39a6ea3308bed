# SPDX-License-Identifier: Apache-2.0
"""What was kept and what was evicted, per prompt, layer, row and KV head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plphp.io.json_files import Kind, from_json, to_json

from .image_report import ImageMemory
from .prompt_report import PromptReport, RowReport, read_prompt
from .report_checks import check_numbers, integers
from .tier_report import LayerBytes, RungBytes

KIND = Kind("report", "`plphp generate --report`", 1)
NUMBERS = (
    "batch",
    "tokens",
    "kv_bytes_full",
    "kv_bytes",
    "reserved_bytes",
    "pruning_seconds",
    "book_bytes",
    "budget_bytes",
    "ledger_bytes",
    "host_bytes",
)


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
    images : list of ImageMemory
        Under a ``vision_budget``, what is held of each image. Then ``prompts`` say what is held now, too.
    budget_bytes : int
        The budget in bytes; 0 without one, and before anything was read.
    ledger_bytes : int
        Bytes in host memory by which the cache knows of which token an entry is; no part of ``kv_bytes``.
    host_bytes : int
        Bytes of whole images that wait in host memory; no part of ``kv_bytes``.
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
    images: list[ImageMemory] = field(default_factory=list)
    budget_bytes: int = 0
    ledger_bytes: int = 0
    host_bytes: int = 0

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
    def vision_bytes(self) -> int:
        """Under a budget, the bytes that all images take; 0 without."""
        return sum(image.nbytes for image in self.images)

    @property
    def wanted(self) -> list[ImageMemory]:
        """Under a budget, the images that the newest answer turns to though they have faded most of the way."""
        return [image for image in self.images if image.wanted]

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
    def computed_share(self) -> float:
        """Tokens x layers that were computed to read the prompts, as a fraction of all: below 1 where tokens left
        before layers got them."""
        early = [prompt for prompt in self.prompts if prompt.computed]
        total = sum(prompt.all_computed for prompt in early)
        return sum(sum(prompt.computed) for prompt in early) / total if total else 1.0

    @property
    def attended_share(self) -> float:
        """Tokens x layers that attended while the prompts were read, as a fraction of all in layers where attention ran
        among important tokens alone; 1 without such layers."""
        computed = sum(prompt.attention_computed for prompt in self.prompts)
        return sum(prompt.attended for prompt in self.prompts) / computed if computed else 1.0

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
    prompts = [read_prompt(prompt) for prompt in values.pop("prompts")]
    collecting = values.pop("collecting", None)
    progress = None if collecting is None else BankProgress(**collecting)
    held = [_read_layer_bytes(layer) for layer in values.pop("held", [])]
    images = [ImageMemory.from_values(image) for image in values.pop("images", [])]
    report = PruneReport(prompts=prompts, collecting=progress, held=held, images=images, **values)
    check_numbers(report, NUMBERS)
    if progress is not None:
        check_numbers(progress, ("collected", "wanted"))
    return report


def _read_layer_bytes(values: dict[str, Any]) -> LayerBytes:
    rungs = [RungBytes(**{**rung, "entries": integers(rung["entries"], "entries")}) for rung in values.pop("rungs", [])]
    layer = LayerBytes(rungs=rungs, **values)
    check_numbers(layer, ("layer", "whole", "tail", "reserved", "means", "other", "read"))
    for rung in rungs:
        check_numbers(rung, ("codes", "scales", "groups"))
    return layer
