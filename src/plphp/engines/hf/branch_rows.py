# SPDX-License-Identifier: Apache-2.0
"""The second half of `plphp.branch`: what each config keeps of the prompt becomes a row of one cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans
from plphp.kernels import compact_kv
from plphp.kernels.coded import CodedKV
from plphp.kernels.coded_bytes import row_nbytes
from plphp.kernels.coder import Coder, coded_rows
from plphp.kernels.packed import PackedKV
from plphp.kernels.precision import as_written
from plphp.kernels.prompt_codes import plain
from plphp.policy.chain import Chain
from plphp.pruning.coders import coders_of
from plphp.pruning.placement import Placement
from plphp.pruning.reading import PromptReading
from plphp.pruning.record import LayerRecord
from plphp.pruning.tail_tokens import TailTokens
from plphp.settings.config import PLPHPConfig

from .attachment import Attachment
from .branch_reading import forward, pruned_layers
from .cache import NOTHING_EVICTED, PrunedCache
from .layer import PrunedLayer

LAYER_LEVEL = (
    "retention_rate",
    "retention_delta",
    "attentive_threshold",
    "indifferent_threshold",
    "target_retention",
    "class_quantile",
    "tiers",
    "read",
    "rest",
    "books",
)
"""Settings that say how much is held and how, and nothing of what: configs that differ in them alone share scores."""


@dataclass(frozen=True)
class Decided:
    """What configs that score alike hold of a layer.

    Parameters
    ----------
    placement : Tensor
        uint8 [config, kv_heads, seq], see `plphp.pruning.placement.Placement`.
    record : LayerRecord
        The record of that.
    coders : list of Coder or None
        By config, what holds entries in few bits.
    """

    placement: Tensor
    record: LayerRecord
    coders: list[Coder | None]


@dataclass(frozen=True)
class Prefilled:
    """What a layer holds for a config that acts inside prefill, and the record of that."""

    prefix: PackedKV
    coded: tuple[CodedKV, ...]
    record: LayerRecord


def scored_alike(
    readings: Sequence[PromptReading | None], configs: Sequence[PLPHPConfig]
) -> list[tuple[PromptReading, list[int]]]:
    """Group the configs that share a reading and every setting but those of `LAYER_LEVEL`.

    Returns
    -------
    list of tuple
        The reading and the numbers of its configs; those that act inside prefill have none and are left out.
    """
    defaults = {name: getattr(NOTHING_EVICTED, name) for name in LAYER_LEVEL}
    groups: dict[Any, tuple[PromptReading, list[int]]] = {}
    for number, (reading, config) in enumerate(zip(readings, configs, strict=True)):
        if reading is not None:
            groups.setdefault((id(reading), replace(config, **defaults)), (reading, []))[1].append(number)
    return list(groups.values())


def decided_rows(
    reading: PromptReading, chains: Sequence[Chain], spans: VisionSpans, device: torch.device
) -> dict[int, Decided]:
    """By pruned layer, allocate and select for configs that score alike: a row for each of them."""
    step, configs = chains[0].kv, [chain.kv.config for chain in chains]
    coders = [coders_of(chain.kv) for chain in chains]
    decided: dict[int, Decided] = {}
    with as_written(device):
        for scores, rows in reading.allocate(step, configs):
            placed = torch.cat(reading.select(step, scores, list(zip(configs, rows, strict=True))))
            own = [None if coder is None else coder(scores.layer) for coder in coders]
            record = LayerRecord.of(
                spans, TailTokens(0, spans.end), reading.place(scores, [row for [row] in rows], placed), own
            )
            decided[scores.layer] = Decided(placed, record, own)
    return decided


def prefilled_row(
    attachment: Attachment, inputs: dict[str, Any], config: PLPHPConfig
) -> tuple[dict[int, Prefilled], Tensor]:
    """Read the prompt once more for a config that acts inside prefill; its row by layer, and its logits [1, vocab]."""
    cache = PrunedCache(attachment, config)
    cache.plan(inputs)
    logits = forward(attachment.model, cache, inputs)
    layers = {record.layer: (cache.layers[record.layer], record) for record in cache.records}
    return {number: Prefilled(layer.prefix, layer.coded, record) for number, (layer, record) in layers.items()}, logits


def merged_rows(
    reader: PrunedCache,
    decided: Sequence[Mapping[int, Decided]],
    prefilled: Sequence[Mapping[int, Prefilled]],
    order: Sequence[int],
) -> PrunedCache:
    """Make a cache with a row for each config.

    Parameters
    ----------
    reader : PrunedCache
        Holds the whole prompt in one row; its layers that cannot be pruned move to the new cache.
    decided, prefilled : sequence of mapping
        What the configs hold by layer, in the order in which rows are stacked.
    order : sequence of int
        By config, the number of its row in that order.
    """
    cache = PrunedCache(reader.attachment, NOTHING_EVICTED)
    source, target = pruned_layers(reader), pruned_layers(cache)
    for number, layer in enumerate(reader.layers):
        if number in source:
            own, below = [layers[number] for layers in decided], [layers[number] for layers in prefilled]
            block, coded = _merged_layer(source[number], own, below)
            records = [*(part.record for part in own), *(part.record for part in below)]
            target[number].begin_with(block.select(order), tuple(part.select(order) for part in coded), source[number])
            cache.records.append(LayerRecord.stacked(records, order))
        else:
            layer.reorder_cache(torch.zeros(len(order), dtype=torch.long))
            cache.layers[number] = layer
    cache.follow_turn(reader, len(order))
    cache.end_here("its rows are pruned by configs of their own; give new text to model(...) directly")
    return cache


def _merged_layer(
    source: PrunedLayer, decided: Sequence[Decided], prefilled: Sequence[Prefilled]
) -> tuple[PackedKV, list[CodedKV]]:
    """What a layer holds whole and in few bits, a row for each config."""
    keys, values = source.tail()
    every = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    # The empty first part is for torch.cat, where every config acts inside prefill and nothing is decided.
    placement = torch.cat([every[:0].to(torch.uint8), *(part.placement for part in decided)])
    whole = compact_kv(keys, values, every).picked(placement == Placement.WHOLE, [part.prefix for part in prefilled])
    coded: list[CodedKV] = []
    if decided:
        coders = [coder for part in decided for coder in part.coders]
        vision = decided[0].record.spans.vision[:1]
        coded += [block.among(0, len(prefilled)) for block in coded_rows(keys, values, vision, placement, coders)]
    for number, part in enumerate(prefilled):
        before, after = len(placement) + number, len(prefilled) - number - 1
        coded += [block.among(before, after) for block in part.coded]
    return whole, coded


def kept_shares(cache: PrunedCache, vision: int, tokens: int) -> tuple[list[dict[int, float]], list[float]]:
    """For each row the vision entries held by layer, as fractions of all; and the bytes held for all tokens, as
    fractions of those of a full cache."""
    by_layer: dict[int, list[float]] = {}
    held = []
    for record in cache.records:
        layer: PrunedLayer = cache.layers[record.layer]
        kv = layer.prefix
        assert kv is not None  # every layer with a record has been compacted
        by_layer[record.layer] = [n / (vision * kv.kv_heads) for n in record.kept_vision.sum((1, 2)).tolist()]
        entry = kv.keys.shape[1] * kv.keys.itemsize + kv.values.shape[1] * kv.values.itemsize
        coded = [sum(row_nbytes(block, row) for block in plain(layer.coded)) for row in range(kv.batch)]
        whole = [sum(kv.counts[stored]) * entry for stored in kv.rows]
        held.append([(a + b) / (tokens * kv.kv_heads * entry) for a, b in zip(whole, coded, strict=True)])
    rows = [dict(zip(by_layer, row, strict=True)) for row in zip(*by_layer.values(), strict=True)]
    return rows, [sum(row) / len(row) for row in zip(*held, strict=True)]
