# SPDX-License-Identifier: Apache-2.0
"""One prompt, read once, as a cache with one row for each of several configs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from plphp.errors import ConfigError, SpanError
from plphp.families.spans import VisionSpans
from plphp.kernels import compact_kv
from plphp.kernels.packed import PackedKV
from plphp.kernels.precision import as_written
from plphp.methods.registry import chain_of
from plphp.policy.chain import Chain
from plphp.pruning.reading import PromptReading
from plphp.pruning.record import LayerRecord
from plphp.pruning.scoring import Attended
from plphp.settings.config import PLPHPConfig, checked

from .attachment import Attachment, Lease
from .cache import PrunedCache
from .cache_argument import passed
from .layer import PrunedLayer
from .refusals import refuse_stages

NOTHING_EVICTED = PLPHPConfig(method="none")

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
"""What some configs keep of each pruned layer, bool [config, kv_heads, seq]."""
Prefilled = dict[int, tuple[PackedKV, LayerRecord]]
"""What each pruned layer holds for a config that acts inside prefill."""


@dataclass(frozen=True)
class Branches:
    """What `branch` returns; lists have one entry per config.

    Parameters
    ----------
    configs : tuple of PLPHPConfig
        As given.
    cache : PrunedCache
        Row i holds the prompt pruned by ``configs[i]``, for ``model(input_ids=..., **passed(cache))`` with as
        many rows. Its own config prunes nothing; its report has the rows as they are.
    logits : Tensor
        [configs, vocab]; the logits of the next token after the prompt. They differ only for methods that act
        inside prefill.
    vision_kept : list of float
        Vision entries kept, as a fraction of all, over the full-attention layers and their KV heads.
    kept : list of float
        All entries kept, as a fraction of all, over the same.
    layer_kept : list of dict of int to float
        By decoder layer, the vision entries kept as a fraction of all.
    """

    configs: tuple[PLPHPConfig, ...]
    cache: PrunedCache
    logits: Tensor
    vision_kept: list[float]
    kept: list[float]
    layer_kept: list[dict[int, float]]


@torch.no_grad()
def branch(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    configs: Sequence[PLPHPConfig],
    *,
    answer_ids: Tensor | None = None,
) -> Branches:
    """Read one prompt once, and prune it by several configs side by side.

    Scores, rates and kept entries are those that `plphp.prune` finds for each config. Methods that act inside prefill
    read the prompt once more each.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    inputs : mapping
        What is passed to ``model(...)``, with one row and no padding.
    configs : sequence of PLPHPConfig
        At least one.
    answer_ids : Tensor, optional
        int64 [answer]; the answer that the method ``oracle`` ranks by. It is read after the prompt, all but its last
        token, and forgotten again.

    Returns
    -------
    Branches
        While its cache is alive the model's text layers use plphp's attention function. A model with m-RoPE places
        what comes next by the prompt that it read last: go on with the cache before it reads another prompt.

    Raises
    ------
    SpanError
        If the prompt has several rows, padding or no vision token.
    ConfigError, UnsupportedModelError, UnsupportedFeatureError

    Examples
    --------
    >>> configs = [PLPHPConfig(method=name, retention_rate=0.25) for name in ("plphp", "random")]
    >>> branches = plphp.branch(model, inputs, configs)  # doctest: +SKIP
    >>> draft = torch.tensor(answer)[None].expand(len(configs), -1)  # doctest: +SKIP
    >>> logits = model(input_ids=draft, **passed(branches.cache)).logits  # doctest: +SKIP
    """
    chosen = tuple(checked(config) for config in configs)
    if not chosen:
        raise ConfigError("branch needs at least one config, got none.")
    lease = Lease.of(model)
    try:
        return _branch(model, lease, dict(inputs), chosen, answer_ids)
    except BaseException:
        # The traceback holds this frame, so the model would stay attached as long as the error is kept.
        lease.end()
        raise


def _branch(
    model: PreTrainedModel,
    lease: Lease,
    inputs: dict[str, Any],
    configs: tuple[PLPHPConfig, ...],
    answer_ids: Tensor | None,
) -> Branches:
    reader = PrunedCache(lease.attachment, NOTHING_EVICTED)
    spans = _planned(reader, inputs)
    chains = [chain_of(config, len(reader.layers)) for config in configs]
    for chain in chains:
        refuse_stages(chain, model, len(_pruned(reader)) == len(reader.layers))
    readings = _readings(reader, spans, chains, answer_ids)
    logits = _observe(reader, spans, readings, inputs, answer_ids)

    groups = _groups(readings, configs)
    device = model.device
    decided = [_decided(reading, [chains[i] for i in numbers], spans, device) for reading, numbers in groups]
    inside = [number for number, reading in enumerate(readings) if reading is None]
    prefilled = [_prefilled(lease.attachment, inputs, configs[number]) for number in inside]
    order = [*(number for _, numbers in groups for number in numbers), *inside]

    rows = [order.index(number) for number in range(len(order))]
    cache = _merged(reader, decided, [layers for layers, _ in prefilled], rows)
    cache._lease = lease
    own = dict(zip(inside, [own_logits for _, own_logits in prefilled], strict=True))
    layer_kept, kept = _shares(cache, int(spans.vision.sum()), spans.end)
    return Branches(
        configs,
        cache,
        torch.cat([own.get(number, logits) for number in range(len(configs))]),
        [sum(row.values()) / len(row) for row in layer_kept],
        kept,
        layer_kept,
    )


def _planned(reader: PrunedCache, inputs: Mapping[str, Any]) -> VisionSpans:
    """Plan the prompt to be read as it is; where its vision tokens are."""
    reader.plan(inputs)
    if reader.reading is None:
        raise SpanError("branch needs a prompt with at least one vision token: there is nothing to prune in this one.")
    spans = reader.reading.spans
    if len(spans.real) != 1 or not spans.real.all():
        raise SpanError(
            f"branch reads one prompt without padding, got {len(spans.real)} rows of which "
            f"{int((~spans.real).sum())} tokens are padding: call it for each row by itself."
        )
    reader.leave_whole()
    return spans


def _readings(
    reader: PrunedCache, spans: VisionSpans, chains: Sequence[Chain], answer_ids: Tensor | None
) -> list[PromptReading | None]:
    """A reading for each config, shared by those that ask the same; None for those that act inside prefill."""
    answer = 0 if answer_ids is None else _answer_rows(answer_ids)
    delta = None if reader.turn is None else reader.turn.after
    known: dict[Any, PromptReading] = {}
    readings: list[PromptReading | None] = []
    for chain in chains:
        if chain.prefill is not None:
            readings.append(None)
            continue
        of_answer = chain.kv.stage.needs_answer
        if of_answer and not answer:
            raise ConfigError(f"The method {chain.kv.method!r} ranks by the answer: pass answer_ids.")
        own = _extended(spans, answer) if of_answer else spans
        reading = PromptReading(own, chain, list(_pruned(reader)), len(reader.layers), rope_delta=delta)
        if of_answer:
            reading.kv.queries = torch.arange(own.end)[None] >= spans.end
        combined = chain.kv.config.gqa_reduction if reading.kv.evidence.best_position else ""
        readings.append(known.setdefault((of_answer, reading.kv.evidence, combined), reading))
    return readings


def _answer_rows(answer_ids: Tensor) -> int:
    """Tokens of the answer that read the cache: the last one leads to nothing, unless it is the only one."""
    if not isinstance(answer_ids, Tensor) or answer_ids.ndim != 1 or not len(answer_ids):
        raise ConfigError(f"answer_ids must be a tensor [answer] with at least one token, got {answer_ids!r:.80}.")
    return max(1, len(answer_ids) - 1)


def _extended(spans: VisionSpans, tokens: int) -> VisionSpans:
    """The spans with text behind the prompt."""
    segment, real = pad(spans.segment, (0, tokens), value=-1), pad(spans.real, (0, tokens), value=True)
    return VisionSpans(segment, real, spans.start, spans.grids)


def _observe(
    reader: PrunedCache,
    spans: VisionSpans,
    readings: Sequence[PromptReading | None],
    inputs: Mapping[str, Any],
    answer_ids: Tensor | None,
) -> Tensor:
    """Read the prompt, and the answer for the readings that ask with it; score every layer for every reading.

    Returns
    -------
    Tensor
        [1, vocab]; logits of the token after the prompt.
    """
    distinct = list({id(reading): reading for reading in readings if reading is not None}.values())
    model = reader.attachment.model
    with _observed_by(reader, [reading for reading in distinct if reading.spans is spans]):
        logits = _forward(model, reader, inputs)
    of_answer = [reading for reading in distinct if reading.spans is not spans]
    if of_answer and answer_ids is not None:
        rows = _answer_rows(answer_ids)
        pruned = _pruned(reader)
        before = {i: copy.deepcopy(layer) for i, layer in enumerate(reader.layers) if i not in pruned}
        with _observed_by(reader, of_answer):
            _forward(model, reader, {"input_ids": answer_ids[None, :rows].to(model.device)})
        for layer in pruned.values():
            layer.remove_last(rows)
        for number, unpruned in before.items():
            reader.layers[number] = unpruned
        for reading in of_answer:
            reading.spans = spans
            reading.kv.scores = {number: scores.first(spans.end) for number, scores in reading.kv.scores.items()}
    return logits


def _observed_by(reader: PrunedCache, readings: Sequence[PromptReading]) -> AbstractContextManager[None]:
    def listener(attended: Attended) -> None:
        for reading in readings:
            reading.observe(attended)

    return reader.listening(listener)


def _forward(model: PreTrainedModel, cache: PrunedCache, inputs: Mapping[str, Any]) -> Tensor:
    """Read into a cache; logits of the last token, [1, vocab]."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output: Any = model(**{**inputs, **last}, **passed(cache), use_cache=True)
    cache.check_read()
    logits: Tensor = output.logits[:, -1]
    return logits


def _groups(
    readings: Sequence[PromptReading | None], configs: Sequence[PLPHPConfig]
) -> list[tuple[PromptReading, list[int]]]:
    """Numbers of the configs that score alike, those that act inside prefill left out."""
    same = {name: getattr(NOTHING_EVICTED, name) for name in LAYER_LEVEL}
    groups: dict[Any, tuple[PromptReading, list[int]]] = {}
    for number, (reading, config) in enumerate(zip(readings, configs, strict=True)):
        if reading is not None:
            groups.setdefault((id(reading), replace(config, **same)), (reading, []))[1].append(number)
    return list(groups.values())


def _decided(reading: PromptReading, chains: Sequence[Chain], spans: VisionSpans, device: torch.device) -> Decided:
    """What each layer keeps by some configs that score alike: a row for each."""
    step, configs = chains[0].kv, [chain.kv.config for chain in chains]
    decided: Decided = {}
    with as_written(device):
        for scores, rows in reading.allocate(step, configs):
            keep = reading.select(step, scores, rows)[:, 0]
            part = reading.place(scores, [row for [row] in rows], keep)
            decided[scores.layer] = keep, LayerRecord.of(spans, 0, part)
    return decided


def _prefilled(attachment: Attachment, inputs: dict[str, Any], config: PLPHPConfig) -> tuple[Prefilled, Tensor]:
    """The row of a config that acts inside prefill, and its logits."""
    cache = PrunedCache(attachment, config)
    cache.plan(inputs)
    logits = _forward(attachment.model, cache, inputs)
    return {record.layer: (cache.layers[record.layer].prefix, record) for record in cache.records}, logits


def _merged(
    reader: PrunedCache, decided: Sequence[Decided], prefilled: Sequence[Prefilled], order: Sequence[int]
) -> PrunedCache:
    """A cache with what was decided for all configs, its rows in a new order."""
    cache = PrunedCache(reader.attachment, NOTHING_EVICTED)
    source, target = _pruned(reader), _pruned(cache)
    for number, layer in enumerate(reader.layers):
        if number in source:
            keys, values = source[number].tail()
            whole = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
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


def _pruned(cache: PrunedCache) -> dict[int, PrunedLayer]:
    return {number: layer for number, layer in enumerate(cache.layers) if isinstance(layer, PrunedLayer)}


def _shares(cache: PrunedCache, vision: int, tokens: int) -> tuple[list[dict[int, float]], list[float]]:
    """For each row the vision entries kept by layer, and all entries kept, as fractions of all."""
    by_layer: dict[int, list[float]] = {}
    entries = []
    for record in cache.records:
        kv: PackedKV = cache.layers[record.layer].prefix
        by_layer[record.layer] = [n / (vision * kv.kv_heads) for n in record.kept_vision.sum((1, 2)).tolist()]
        entries.append([sum(kv.counts[stored]) / (tokens * kv.kv_heads) for stored in kv.rows])
    rows = [dict(zip(by_layer, row, strict=True)) for row in zip(*by_layer.values(), strict=True)]
    return rows, [sum(row) / len(row) for row in zip(*entries, strict=True)]
