# SPDX-License-Identifier: Apache-2.0
"""What a cache holds at one moment, for a report that may be asked for later, or never.

A report of a long conversation names thousands of positions. Here is what it is worked out from: in host memory alone,
so that keys and values are free as soon as their cache is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plphp.kernels.codecs import Codes
from plphp.kernels.coded import CodedKV

from .entries import LayerEntries
from .held_now import records_now
from .image_memory import image_memories
from .image_report import ImageMemory
from .image_table import ImageTable
from .ledger import codes_of
from .left_tokens import AttendedTokens, LeftTokens
from .prompt_report import PromptReport
from .record import LayerRecord, prompt_reports


@dataclass(frozen=True)
class HeldState:
    """What a cache holds at one moment; see `of`."""

    records: Sequence[LayerRecord]
    layers: Mapping[int, LayerEntries]
    images: ImageTable | None
    left: Mapping[int, LeftTokens]
    attended: Mapping[int, AttendedTokens]

    @classmethod
    def of(
        cls,
        records: Sequence[LayerRecord],
        layers: Mapping[int, LayerEntries],
        images: ImageTable | None,
        left: Mapping[int, LeftTokens],
        attended: Mapping[int, AttendedTokens],
    ) -> HeldState:
        """Note what layers hold now.

        Parameters
        ----------
        records, layers, left, attended
            See `plphp.pruning.record.prompt_reports`.
        images : ImageTable, optional
            The images of the conversation, where they fade.
        """
        outlines = {number: outline(layer) for number, layer in layers.items()}
        return cls(list(records), outlines, None if images is None else images.copied(), dict(left), dict(attended))

    def prompt_reports(self) -> list[PromptReport]:
        """What was kept of each prompt, by what is held of it now where images fade."""
        records = self.records
        if self.images is not None:
            records = records_now(records, self.layers, self.images)
        return prompt_reports(records, self.layers, self.left, self.attended)

    def image_memories(self) -> list[ImageMemory]:
        """What is held of each image, where images fade."""
        return [] if self.images is None else image_memories(self.layers, self.images)


def outline(layer: LayerEntries) -> LayerEntries:
    """The sizes of a layer, its ledger, and what the ledger is of as tensors that take no memory."""
    result, codes = LayerEntries(), codes_of(layer.coded)
    result.take_sizes(layer)
    result.ledger = layer.ledger
    if layer.prefix is not None:
        prefix = layer.prefix
        result.prefix = replace(prefix, keys=prefix.keys.to("meta"), values=prefix.values.to("meta"))
    if layer.ledger is not None and codes is not None:
        result.coded = (replace(codes, block=_block(codes.block)),)
    return result


def _block(block: CodedKV) -> CodedKV:
    tiers = tuple(replace(tier, keys=_codes(tier.keys), values=_codes(tier.values)) for tier in block.tiers)
    key_means, value_means, rest = (
        None if own is None else own.to("meta") for own in (*block.means, block.rest_values)
    )
    return CodedKV(tiers, key_means, value_means, None, block.reading, rest)


def _codes(codes: Codes) -> Codes:
    scales, groups = (None if own is None else own.to("meta") for own in (codes.scales, codes.groups))
    return Codes(tuple(stream.to("meta") for stream in codes.streams), scales, groups)
