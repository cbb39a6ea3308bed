# SPDX-License-Identifier: Apache-2.0
"""The second half of `plphp.branch`: what each config keeps of the prompt becomes a row of one cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans
from plphp.kernels import compact_kv
from plphp.kernels.packed import PackedKV
from plphp.kernels.precision import as_written
from plphp.policy.chain import Chain
from plphp.pruning.reading import PromptReading
from plphp.pruning.record import LayerRecord
from plphp.settings.config import PLPHPConfig

from .attachment import Attachment
from .branch_reading import forward, pruned_layers
from .cache import NOTHING_EVICTED, PrunedCache

LAYER_LEVEL = (
    "retention_rate",
    "retention_delta",
    "attentive_threshold",
    "indifferent_threshold",
    "target_retention",
    "class_quantile",
)
"""Settings that say how much is kept, and nothing of what: configs that differ in them alone share their scores."""
Decided = dict[int, tuple[Tensor, LayerRecord]]
"""By pruned layer, what configs that score alike keep of it, bool [config, kv_heads, seq], and the record of that."""
Prefilled = dict[int, tuple[PackedKV, LayerRecord]]
"""By pruned layer, what it holds for a config that acts inside prefill, and the record of that."""


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


def decided_rows(reading: PromptReading, chains: Sequence[Chain], spans: VisionSpans, device: torch.device) -> Decided:
    """Allocate and select for configs that score alike: a row for each of them, in each layer."""
    step, configs = chains[0].kv, [chain.kv.config for chain in chains]
    decided: Decided = {}
    with as_written(device):
        for scores, rows in reading.allocate(step, configs):
            keep = reading.select(step, scores, rows)[:, 0]
            part = reading.place(scores, [row for [row] in rows], keep)
            decided[scores.layer] = keep, LayerRecord.of(spans, 0, part)
    return decided


def prefilled_row(attachment: Attachment, inputs: dict[str, Any], config: PLPHPConfig) -> tuple[Prefilled, Tensor]:
    """Read the prompt once more for a config that acts inside prefill; its row and its logits [1, vocab]."""
    cache = PrunedCache(attachment, config)
    cache.plan(inputs)
    logits = forward(attachment.model, cache, inputs)
    return {record.layer: (cache.layers[record.layer].prefix, record) for record in cache.records}, logits


def merged_rows(
    reader: PrunedCache, decided: Sequence[Decided], prefilled: Sequence[Prefilled], order: Sequence[int]
) -> PrunedCache:
    """Make a cache with a row for each config.

    Parameters
    ----------
    reader : PrunedCache
        Holds the whole prompt in one row; its layers that cannot be pruned move to the new cache.
    decided, prefilled : sequence of dict
        What the configs keep, in the order in which rows are stacked.
    order : sequence of int
        By config, the number of its row in that order.
    """
    cache = PrunedCache(reader.attachment, NOTHING_EVICTED)
    source, target = pruned_layers(reader), pruned_layers(cache)
    for number, layer in enumerate(reader.layers):
        if number in source:
            keys, values = source[number].tail()
            whole = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
            # The empty first part is for torch.cat, where every config acts inside prefill and nothing is decided.
            keep = torch.cat([whole[:0], *(layers[number][0] for layers in decided)])
            block = compact_kv(keys, values, whole).picked(keep, [layers[number][0] for layers in prefilled])
            records = [*(layers[number][1] for layers in decided), *(layers[number][1] for layers in prefilled)]
            target[number].begin_with(block.select(order), source[number])
            cache.records.append(LayerRecord.stacked(records, order))
        else:
            layer.reorder_cache(torch.zeros(len(order), dtype=torch.long))
            cache.layers[number] = layer
    cache.follow_turn(reader, len(order))
    cache.end_here("its rows are pruned by configs of their own; give new text to model(...) directly")
    return cache


def kept_shares(cache: PrunedCache, vision: int, tokens: int) -> tuple[list[dict[int, float]], list[float]]:
    """For each row the vision entries kept by layer, and all entries kept, as fractions of all."""
    by_layer: dict[int, list[float]] = {}
    entries = []
    for record in cache.records:
        kv: PackedKV = cache.layers[record.layer].prefix
        by_layer[record.layer] = [n / (vision * kv.kv_heads) for n in record.kept_vision.sum((1, 2)).tolist()]
        entries.append([sum(kv.counts[stored]) / (tokens * kv.kv_heads) for stored in kv.rows])
    rows = [dict(zip(by_layer, row, strict=True)) for row in zip(*by_layer.values(), strict=True)]
    return rows, [sum(row) / len(row) for row in zip(*entries, strict=True)]
