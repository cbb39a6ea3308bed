# SPDX-License-Identifier: Apache-2.0
"""One prompt, read once, as a cache with one row for each of several configs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
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
from plphp.methods.registry import method_for
from plphp.policy.method import Method
from plphp.pruning.plan import LAYER_LEVEL, Gathered, PromptPlan, gather
from plphp.pruning.record import LayerRecord
from plphp.settings.config import PLPHPConfig, checked

from .attachment import Attachment, Lease
from .cache import PrunedCache
from .cache_argument import passed
from .layer import PrunedLayer
from .refusals import refuse_prompt_stage

NOTHING_EVICTED = PLPHPConfig(method="none")

Chosen = dict[int, tuple[Tensor, LayerRecord]]
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
    reader = _Reader(lease.attachment, inputs)
    methods = [method_for(config, len(reader.layers)) for config in configs]
    for method in methods:
        refuse_prompt_stage(method, model, len(reader.pruned) == len(reader.layers))
    plans = _plans(reader, methods, configs, answer_ids)
    logits = reader.read(plans, inputs, answer_ids)

    groups = _groups(plans, configs)
    chosen = [reader.chosen(plan, methods[numbers[0]], [configs[i] for i in numbers]) for plan, numbers in groups]
    inside = [number for number, plan in enumerate(plans) if plan is None]
    prefilled = [_prefilled(lease.attachment, inputs, configs[number]) for number in inside]
    order = [*(number for _, numbers in groups for number in numbers), *inside]

    cache = reader.merged(chosen, [row for row, _ in prefilled], [order.index(number) for number in range(len(order))])
    cache._lease = lease
    own = dict(zip(inside, [found for _, found in prefilled], strict=True))
    layer_kept, kept = _shares(cache, int(reader.spans.vision.sum()), reader.spans.end)
    return Branches(
        configs,
        cache,
        torch.cat([own.get(number, logits) for number in range(len(configs))]),
        [sum(row.values()) / len(row) for row in layer_kept],
        kept,
        layer_kept,
    )


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


def _groups(plans: Sequence[PromptPlan | None], configs: Sequence[PLPHPConfig]) -> list[tuple[PromptPlan, list[int]]]:
    """Numbers of the configs that rank alike, those that act inside prefill left out."""
    same = {name: getattr(NOTHING_EVICTED, name) for name in LAYER_LEVEL}
    groups: dict[Any, tuple[PromptPlan, list[int]]] = {}
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True)):
        if plan is not None:
            groups.setdefault((id(plan), replace(config, **same)), (plan, []))[1].append(number)
    return list(groups.values())


def _plans(
    reader: _Reader, methods: Sequence[Method], configs: Sequence[PLPHPConfig], answer_ids: Tensor | None
) -> list[PromptPlan | None]:
    """A plan for each config, shared by those that look at the same; None for those that act inside prefill."""
    answer = 0 if answer_ids is None else _answer_rows(answer_ids)
    spans, delta = reader.spans, None if reader.turn is None else reader.turn.after
    known: dict[Any, PromptPlan] = {}
    plans: list[PromptPlan | None] = []
    for method, config in zip(methods, configs, strict=True):
        if method.stage is not None:
            plans.append(None)
            continue
        if method.needs_answer and not answer:
            raise ConfigError(f"The method {method.name!r} ranks by the answer: pass answer_ids.")
        plan = PromptPlan.of(spans, config, method.evidence(config), custom=False, rope_delta=delta)
        if method.needs_answer:
            queries = torch.zeros(1, spans.end + answer, dtype=torch.bool)
            queries[:, spans.end :] = True
            plan.queries, plan.spans = queries, _extended(spans, answer)
        combined = config.gqa_reduction if plan.evidence.best_rank else ""
        plans.append(known.setdefault((method.needs_answer, plan.evidence, combined), plan))
    return plans


def _answer_rows(answer_ids: Tensor) -> int:
    """Tokens of the answer that read the cache: the last one leads to nothing, unless it is the only one."""
    if not isinstance(answer_ids, Tensor) or answer_ids.ndim != 1 or not len(answer_ids):
        raise ConfigError(f"answer_ids must be a tensor [answer] with at least one token, got {answer_ids!r:.80}.")
    return max(1, len(answer_ids) - 1)


def _extended(spans: VisionSpans, tokens: int) -> VisionSpans:
    """The spans with text behind the prompt."""
    segment, real = pad(spans.segment, (0, tokens), value=-1), pad(spans.real, (0, tokens), value=True)
    return VisionSpans(segment, real, spans.start, spans.grids)


def _forward(model: PreTrainedModel, cache: PrunedCache, inputs: Mapping[str, Any]) -> Tensor:
    """Read into a cache; logits of the last token, [1, vocab]."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output: Any = model(**{**inputs, **last}, **passed(cache), use_cache=True)
    cache.check_read()
    logits: Tensor = output.logits[:, -1]
    return logits


def _prefilled(attachment: Attachment, inputs: dict[str, Any], config: PLPHPConfig) -> tuple[Prefilled, Tensor]:
    """The row of a config that acts inside prefill, and its logits."""
    cache = PrunedCache(attachment, config)
    cache.plan(inputs)
    logits = _forward(attachment.model, cache, inputs)
    return {record.layer: (cache.layers[record.layer].prefix, record) for record in cache.records}, logits


class _Reader(PrunedCache):
    """Reads a prompt as it is, and holds on to the queries that will rank it."""

    def __init__(self, attachment: Attachment, inputs: Mapping[str, Any]) -> None:
        super().__init__(attachment, NOTHING_EVICTED)
        self.plan(inputs)
        if self._plan is None:
            raise SpanError(
                "branch needs a prompt with at least one vision token: there is nothing to prune in this one."
            )
        self.spans = self._plan.spans
        if len(self.spans.real) != 1 or not self.spans.real.all():
            raise SpanError(
                f"branch reads one prompt without padding, got {len(self.spans.real)} rows of which "
                f"{int((~self.spans.real).sum())} tokens are padding: call it for each row by itself."
            )
        self._plan = None
        self._wanted = torch.zeros(1, 0, dtype=torch.bool)
        self._queries: dict[int, tuple[Gathered, float]] = {}

    @property
    def pruned(self) -> dict[int, PrunedLayer]:
        """The full-attention layers by number."""
        return self._pruned

    def after_attention(self, layer_idx: int, query: Tensor, scaling: float) -> None:
        """Note the queries that were asked for."""
        self._guard.pending = None
        found = gather(self._wanted, query, self._pruned[layer_idx].get_seq_length() - query.shape[2])
        if found is not None:
            self._queries[layer_idx] = found, scaling

    def read(self, plans: Sequence[PromptPlan | None], inputs: Mapping[str, Any], answer_ids: Tensor | None) -> Tensor:
        """Read the prompt, and the answer for the plans that look at it; score every layer for every plan.

        Returns
        -------
        Tensor
            [1, vocab]; logits of the token after the prompt.
        """
        distinct = {id(plan): plan for plan in plans if plan is not None}.values()
        of_prompt = [plan for plan in distinct if plan.spans is self.spans]
        of_answer = [plan for plan in distinct if plan.spans is not self.spans]
        model = self.attachment.model
        self._wanted = _union([plan.queries for plan in of_prompt], self.spans.end)
        logits = _forward(model, self, inputs)
        self._score(of_prompt)
        if of_answer and answer_ids is not None:
            rows = _answer_rows(answer_ids)
            others = {i: copy.deepcopy(layer) for i, layer in enumerate(self.layers) if i not in self._pruned}
            self._wanted = _union([plan.queries for plan in of_answer], self.spans.end + rows)
            _forward(model, self, {"input_ids": answer_ids[None, :rows].to(model.device)})
            self._score(of_answer)
            for layer in self._pruned.values():
                layer.crop(-rows)
            for number, other in others.items():
                self.layers[number] = other
            for plan in of_answer:
                plan.spans = self.spans
                plan.scores = {number: scores.first(self.spans.end) for number, scores in plan.scores.items()}
        return logits

    def _score(self, plans: Sequence[PromptPlan]) -> None:
        for number, (gathered, scaling) in self._queries.items():
            with as_written(gathered[0].device):
                for plan in plans:
                    plan.score_with([gathered], number, self._pruned[number], scaling)
        self._queries.clear()

    def chosen(self, plan: PromptPlan, method: Method, configs: Sequence[PLPHPConfig]) -> Chosen:
        """What each layer keeps by some configs that rank alike."""
        with as_written(self.attachment.model.device):
            return {
                scores.layer: (keep[:, 0], LayerRecord.of(self.spans, 0, scores, [row for [row] in rows], keep[:, 0]))
                for scores, rows, keep, _ in plan.choose(method, configs, self.judged(configs[0]))
            }

    def merged(self, chosen: Sequence[Chosen], prefilled: Sequence[Prefilled], order: Sequence[int]) -> PrunedCache:
        """A cache with what was found for all configs, its rows in a new order."""
        cache = PrunedCache(self.attachment, NOTHING_EVICTED)
        for number, layer in enumerate(self.layers):
            if number in self._pruned:
                keys, values = self._pruned[number].tail()
                whole = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
                keep = torch.cat([whole[:0], *(one[number][0] for one in chosen)])
                block = compact_kv(keys, values, whole).picked(keep, [row[number][0] for row in prefilled])
                records = [*(one[number][1] for one in chosen), *(row[number][1] for row in prefilled)]
                cache._pruned[number].begin_with(block.select(order), self._pruned[number])
                cache.records.append(LayerRecord.stacked(records, order))
            else:
                layer.reorder_cache(torch.zeros(len(order), dtype=torch.long))
                cache.layers[number] = layer
        if self._turn is not None:
            after = self._turn.after.expand(len(order), -1)
            cache._turn = replace(self._turn, after=after, before=None, start=-1)
        cache.end_here("its rows are pruned by configs of their own; give new text to model(...) directly")
        return cache


def _union(masks: Sequence[Tensor], length: int) -> Tensor:
    """Positions that any mask [1, length] marks."""
    result = torch.zeros(1, length, dtype=torch.bool)
    for mask in masks:
        result |= mask
    return result
