# SPDX-License-Identifier: Apache-2.0
"""Whole answers of every variant, graded by any metric: decoded side by side, or by ordinary ``generate``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.session import prune
from plphp.errors import NonFiniteAttentionError
from plphp.pruning.report import PruneReport

from .controls import blank, interpolated_positions
from .conversation import Conversation, batch_inputs, encode, end_tokens
from .forcing import decode, groups_of
from .metrics import best_score, get_metric
from .scoring import ROWS, Outcome
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .tasks import Sample

MARGIN = 16
"""New tokens allowed beyond the length of the reference where no limit is given."""


@dataclass(frozen=True)
class _Answer:
    """What a variant said in one turn, and the vision KV that it kept."""

    turn: int
    text: str
    kept: float


def decode_sample(
    model: PreTrainedModel,
    processor: Any,
    sample: Sample,
    variants: Sequence[Variant],
    metric: str,
    *,
    rows: int = ROWS,
    max_new_tokens: int | None = None,
) -> dict[str, Outcome]:
    """Let all variants answer side by side, as rows of one cache, and grade the answers.

    The prompt is read once for many variants; each then goes on with its own greedy tokens. In a dialogue every
    scored turn is asked for after the reference answers of those before it.

    Parameters
    ----------
    model, processor, sample, variants, rows
        See `plphp.evaluation.scoring.verify`.
    metric : str
        Name of the metric, see `plphp.evaluation.metrics.METRICS`.
    max_new_tokens : int, optional
        Longest answer; default: 1.5 times the reference's tokens and `MARGIN` more.

    Returns
    -------
    dict
        Outcome by the name of the variant.
    """
    ends = end_tokens(model, processor)
    conversation = encode(processor, sample, ends)
    answers: dict[str, list[_Answer]] = {variant.name: [] for variant in variants}
    for group in groups_of(model, processor, sample, variants, rows):
        for number, span in enumerate(conversation.answers):
            if not span.scored:
                continue
            history, answer = conversation.draft[: span.start], torch.tensor(span.tokens[:-1])
            limit = max_new_tokens or _limit(conversation, number)
            for name, (tokens, kept) in decode(model, group, history, answer, ends, limit).items():
                text = str(processor.decode(tokens, skip_special_tokens=True)).strip()
                answers[name].append(_Answer(number, text, kept))
    return {variant.name: _graded(sample, answers[variant.name], metric) for variant in variants}


def generate_samples(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    variants: Sequence[Variant],
    metric: str,
    *,
    max_new_tokens: int | None = None,
) -> list[dict[str, Outcome]]:
    """Answer samples with ordinary ``generate`` inside `plphp.prune`, variant by variant, and grade the answers.

    Samples of one turn are answered as one left-padded batch; dialogues, and all where chance has a part, one by one.

    Returns
    -------
    list of dict
        For each sample, its outcomes by the name of the variant.
    """
    outcomes: list[dict[str, Outcome]] = [{} for _ in samples]
    for variant in variants:
        single = [number for number, sample in enumerate(samples) if len(sample.turns) == 1 and not variant.draws]
        for number, sample in enumerate(samples):
            if number not in single:
                answers = _generate_one(model, processor, sample, variant, max_new_tokens)
                outcomes[number][variant.name] = _graded(sample, answers, metric)
        batch = [samples[number] for number in single]
        if batch:
            found = _generate_batch(model, processor, batch, variant, max_new_tokens)
            for number, answer in zip(single, found, strict=True):
                outcomes[number][variant.name] = _graded(samples[number], [answer], metric)
    return outcomes


def accepted_answers(sample: Sample, turn: int) -> tuple[str, ...]:
    """Answers of a turn that count as right: those of a data set with several, else the reference."""
    several: tuple[str, ...] = getattr(sample, "accepted", ())
    return several if several and turn == len(sample.turns) - 1 else (sample.turns[turn].answer,)


def _graded(sample: Sample, answers: Sequence[_Answer], metric: str) -> Outcome:
    """All scored turns have to be right; partial scores are averaged over them."""
    grade = get_metric(metric)
    scores = [best_score(grade, answer.text, accepted_answers(sample, answer.turn)) for answer in answers]
    score = statistics.fmean(scores) if metric == "edit_similarity" else min(scores)
    text = "\n".join(answer.text for answer in answers)
    return Outcome(score, statistics.fmean(answer.kept for answer in answers), text=None if score == 1 else text)


def _limit(conversation: Conversation, turn: int) -> int:
    return int(1.5 * len(conversation.answers[turn].tokens)) + MARGIN


def _generate_batch(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample], variant: Variant, limit: int | None
) -> list[_Answer]:
    if variant.images == "smaller":  # every sample has its own size of input
        return [_generate_one(model, processor, sample, variant, limit)[0] for sample in samples]
    shown = [blank(sample) for sample in samples] if variant.images == "blank" else list(samples)
    inputs = _on_device(model, batch_inputs(processor, shown))
    longest = limit or max(_reference_limit(model, processor, sample) for sample in samples)
    with prune(model, variant.config) as run:
        output = _greedy(model, inputs, longest)
    kept = _kept(run.report)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [_Answer(0, text.strip(), share) for text, share in zip(texts, kept, strict=True)]


def _generate_one(
    model: PreTrainedModel, processor: Any, sample: Sample, variant: Variant, limit: int | None
) -> list[_Answer]:
    """Read the first prompt, evict, go on with the reference history, and generate on the same cache."""
    conversation = encode(processor, sample, end_tokens(model, processor))
    [group] = groups_of(model, processor, sample, [variant], 1)
    inputs, config = _on_device(model, group.inputs), group.variants[0].config
    answers = []
    for number, span in enumerate(conversation.answers):
        if not span.scored:
            continue
        cache = PrunedCache.for_inputs(model, inputs, config)
        ids = torch.cat([inputs["input_ids"], conversation.draft[None, : span.start].to(model.device)], 1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode(), interpolated_positions(model) if group.interpolated else nullcontext():
            if span.start:
                model(**inputs, **passed(cache))
            else:
                given = inputs
            output = _greedy(model, given, limit or _limit(conversation, number), **passed(cache))
        text = str(processor.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        answers.append(_Answer(number, text, _kept(cache.report())[0] * group.share))
    return answers


def _greedy(model: PreTrainedModel, inputs: dict[str, Any], max_new_tokens: int, **more: Any) -> Tensor:
    generate: Any = model.generate
    with torch.inference_mode():
        tokens: Tensor = generate(**inputs, **more, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return tokens


def _reference_limit(model: PreTrainedModel, processor: Any, sample: Sample) -> int:
    return _limit(encode(processor, sample, end_tokens(model, processor)), 0)


def _kept(report: PruneReport) -> list[float]:
    """What each row kept of the first prompt, as `Forced.kept` counts it.

    Raises
    ------
    NonFiniteAttentionError
        If the attention of a row held NaN or inf: it has an answer, but none that a method can be judged by.
    """
    if not report.prompts:
        return [1.0] * report.batch
    shares = []
    for row in range(report.batch):
        layers = [layer.rows[row] for layer in report.prompts[0].layers]
        if any(layer.layer_class == "non-finite" for layer in layers):
            raise NonFiniteAttentionError(f"The attention of row {row} of the batch holds NaN or inf.")
        total = sum(layer.vision_tokens * len(layer.kept) for layer in layers)
        stored = sum(sum(layer.kept) - sum(map(len, layer.evicted_text)) for layer in layers)
        shares.append(stored / total if total else 1.0)
    return shares


def _on_device(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
