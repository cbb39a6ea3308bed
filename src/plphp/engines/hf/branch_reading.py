# SPDX-License-Identifier: Apache-2.0
"""The first half of `plphp.branch`: one prompt is read whole, and scored for every question that configs ask of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from plphp.errors import ConfigError, SpanError, UnsupportedFeatureError
from plphp.families.spans import VisionSpans
from plphp.policy.chain import Chain
from plphp.pruning.reading import PromptReading
from plphp.pruning.scoring import Attended

from .cache import PrunedCache
from .cache_argument import passed
from .layer import PrunedLayer
from .rotation_probe import rotations_of


def plan_whole(reader: PrunedCache, inputs: Mapping[str, Any]) -> VisionSpans:
    """Plan a prompt that ``reader`` is to read as it is, and find its vision tokens.

    Raises
    ------
    SpanError
        If the prompt has several rows, padding or no vision token.
    """
    reader.plan(inputs)
    if reader.reading is None:
        raise SpanError("branch needs a prompt with at least one vision token: there is nothing to prune in this one.")
    spans = reader.reading.spans
    if len(spans.valid) != 1 or not spans.valid.all():
        raise SpanError(
            f"branch reads one prompt without padding, got {len(spans.valid)} rows of which "
            f"{int((~spans.valid).sum())} tokens are padding: call it for each row by itself."
        )
    reader.leave_whole()
    return spans


def readings_of(
    reader: PrunedCache, spans: VisionSpans, chains: Sequence[Chain], answer_ids: Tensor | None
) -> list[PromptReading | None]:
    """Make a reading for each chain, shared by the chains that ask the same; None for those that act inside prefill.

    Raises
    ------
    ConfigError
        If a method ranks by the answer, and ``answer_ids`` is missing or no answer.
    """
    answer_tokens = 0 if answer_ids is None else _answer_tokens(answer_ids)
    rope_delta = None if reader.turn is None else reader.turn.after
    by_question: dict[Any, PromptReading] = {}
    readings: list[PromptReading | None] = []
    for chain in chains:
        of_answer = chain.kv.stage.needs_answer
        if chain.changes_prefill:
            early = " and ".join(repr(link.method) for link in chain.changes_prefill)
            if len(pruned_layers(reader)) < len(reader.layers):
                # Rows share those layers, and what has left is in their windows and states.
                raise UnsupportedFeatureError(
                    f"plphp.branch shares layers with windows or states between its rows, and {early} would leave "
                    "other tokens in them: use plphp.prune or PrunedCache for this model, or a method of the KV cache."
                )
            if of_answer:
                raise ConfigError(
                    f"The method {chain.kv.method!r} asks with the answer's queries over the whole prompt: no method "
                    f"can act before it, got {early}."
                )
            readings.append(None)
            continue
        if of_answer and not answer_tokens:
            raise ConfigError(f"The method {chain.kv.method!r} ranks by the answer: pass answer_ids.")
        own_spans = _with_text_behind(spans, answer_tokens) if of_answer else spans
        reading = PromptReading(
            own_spans,
            chain,
            list(pruned_layers(reader)),
            len(reader.layers),
            rope_delta=rope_delta,
            rotations=partial(rotations_of, reader.attachment),
        )
        if of_answer:
            reading.kv.queries = torch.arange(own_spans.end)[None] >= spans.end
        # gqa_reduction changes the question only where the evidence itself combines query heads.
        combined = chain.kv.config.gqa_reduction if reading.kv.evidence.best_position else ""
        drawn = chain.kv.config.seed if reading.kv.evidence.random_rows else 0
        readings.append(by_question.setdefault((of_answer, reading.kv.evidence, combined, drawn), reading))
    return readings


def read_and_score(
    reader: PrunedCache,
    spans: VisionSpans,
    readings: Sequence[PromptReading | None],
    inputs: Mapping[str, Any],
    answer_ids: Tensor | None,
) -> Tensor:
    """Read the prompt, and behind it the answer for the readings that ask with it; score every layer for each reading.

    Returns
    -------
    Tensor
        [1, vocab]; logits of the token after the prompt.
    """
    distinct = list({id(reading): reading for reading in readings if reading is not None}.values())
    of_prompt = [reading for reading in distinct if reading.spans is spans]
    of_answer = [reading for reading in distinct if reading.spans is not spans]
    with _scored_for(reader, of_prompt):
        logits = forward(reader.attachment.model, reader, inputs)
    if of_answer and answer_ids is not None:
        _score_by_answer(reader, of_answer, answer_ids)
        for reading in of_answer:
            reading.spans = spans
            reading.kv.scores = {number: scores.first(spans.end) for number, scores in reading.kv.scores.items()}
    return logits


def _score_by_answer(reader: PrunedCache, readings: Sequence[PromptReading], answer_ids: Tensor) -> None:
    """Read the answer behind the prompt, and leave the cache as it was before."""
    tokens = _answer_tokens(answer_ids)
    pruned, model = pruned_layers(reader), reader.attachment.model
    # Layers with a sliding window or a recurrent state cannot take tokens back: they are restored from a copy.
    before = {number: copy.deepcopy(layer) for number, layer in enumerate(reader.layers) if number not in pruned}
    with _scored_for(reader, readings):
        forward(model, reader, {"input_ids": answer_ids[None, :tokens].to(model.device)})
    for layer in pruned.values():
        layer.remove_last(tokens)
    for number, unpruned in before.items():
        reader.layers[number] = unpruned


def _scored_for(reader: PrunedCache, readings: Sequence[PromptReading]) -> AbstractContextManager[None]:
    """While open, whatever a layer of ``reader`` attends to is scored for all of these readings."""

    def listener(attended: Attended) -> None:
        for reading in readings:
            reading.observe(attended)

    return reader.listening(listener)


def forward(model: PreTrainedModel, cache: PrunedCache, inputs: Mapping[str, Any]) -> Tensor:
    """Read ``inputs`` into a cache; return the logits of their last token, [1, vocab]."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with cache.tower_recorded():
        output: Any = model(**{**inputs, **last}, **passed(cache), use_cache=True)
    cache.check_read()
    logits: Tensor = output.logits[:, -1]
    return logits


def pruned_layers(cache: PrunedCache) -> dict[int, PrunedLayer]:
    """The layers of a cache that can be pruned, by their numbers."""
    return {number: layer for number, layer in enumerate(cache.layers) if isinstance(layer, PrunedLayer)}


def _answer_tokens(answer_ids: Tensor) -> int:
    """Tokens of the answer that read the cache: the last one leads to nothing, unless it is the only one."""
    if not isinstance(answer_ids, Tensor) or answer_ids.ndim != 1 or not len(answer_ids):
        raise ConfigError(f"answer_ids must be a tensor [answer] with at least one token, got {answer_ids!r:.80}.")
    return max(1, len(answer_ids) - 1)


def _with_text_behind(spans: VisionSpans, tokens: int) -> VisionSpans:
    """The spans of a prompt with so many text tokens behind it."""
    segment, valid = pad(spans.segment, (0, tokens), value=-1), pad(spans.valid, (0, tokens), value=True)
    return VisionSpans(segment, valid, spans.start, spans.grids)
