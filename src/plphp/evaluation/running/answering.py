# SPDX-License-Identifier: Apache-2.0
"""Whole answers of every variant, graded by any metric: decoded side by side, or by ordinary ``generate``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.session import prune
from plphp.errors import NonFiniteAttentionError
from plphp.evaluation.settings import ROWS
from plphp.evaluation.tasks.metrics import Metric, get_metric
from plphp.inputs.prompt import on_device
from plphp.pruning.report import PruneReport
from plphp.settings.checks import check_int

from .controls import blank, interpolated_positions
from .conversation import Conversation, batch_inputs, encode, end_tokens
from .forcing import decode, generate_greedily, groups_of
from .scoring import Outcome
from .shares import Shares
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.evaluation.tasks.task import Sample

MARGIN = 16
"""New tokens allowed beyond the length of the reference where no limit is given."""


@dataclass(frozen=True)
class _Answer:
    """What a variant said in a turn, and what it kept of the prompt."""

    turn: int
    text: str
    shares: Shares


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
        See `plphp.evaluation.running.scoring.verify`.
    metric : str
        Name of the metric, see `plphp.evaluation.tasks.metrics.METRICS`.
    max_new_tokens : int, optional
        Longest answer; default: 1.5 times the reference's tokens and `MARGIN` more.

    Returns
    -------
    dict
        Outcome by the name of the variant.
    """
    check_longest(max_new_tokens)
    grade = get_metric(metric)
    ends = end_tokens(model, processor)
    conversation = encode(processor, sample, ends)
    answers: dict[str, list[_Answer]] = {variant.name: [] for variant in variants}
    for group in groups_of(model, processor, sample, variants, rows):
        for turn, span in enumerate(conversation.answers):
            if not span.scored:
                continue
            history, reference = conversation.draft[: span.start], torch.tensor(span.tokens[:-1])
            limit = _limit(conversation, turn) if max_new_tokens is None else max_new_tokens
            for name, (tokens, shares) in decode(model, group, history, reference, ends, limit).items():
                answers[name].append(_Answer(turn, _text(processor, tokens), shares))
    return {variant.name: _graded(sample, answers[variant.name], grade) for variant in variants}


def check_longest(max_new_tokens: int | None) -> None:
    """Raise `ConfigError` unless the longest answer is left open, or an integer of at least 1."""
    if max_new_tokens is not None:
        check_int("max_new_tokens", max_new_tokens, minimum=1, or_else="None")


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

    Samples of one turn are answered as one left-padded batch. Dialogues are answered alone, and so are all samples of a
    variant in which chance has a part: a batch has a single seed.

    Parameters
    ----------
    model, processor, samples, variants, metric, max_new_tokens
        See `decode_sample`.

    Returns
    -------
    list of dict
        For each sample, its outcomes by the name of the variant.
    """
    check_longest(max_new_tokens)
    grade = get_metric(metric)
    outcomes: list[dict[str, Outcome]] = [{} for _ in samples]
    for variant in variants:
        together = [number for number, sample in enumerate(samples) if _fits_a_batch(sample, variant)]
        answers: dict[int, list[_Answer]] = {}
        for number, sample in enumerate(samples):
            if number not in together:
                answers[number] = _generate_alone(model, processor, sample, variant, max_new_tokens)
        if together:
            batch = [samples[number] for number in together]
            said = _generate_batch(model, processor, batch, variant, max_new_tokens)
            answers |= {number: [answer] for number, answer in zip(together, said, strict=True)}
        for number, turns in answers.items():
            outcomes[number][variant.name] = _graded(samples[number], turns, grade)
    return outcomes


def _fits_a_batch(sample: Sample, variant: Variant) -> bool:
    # Smaller images: every sample has its own size of input.
    return len(sample.turns) == 1 and not variant.draws and variant.images != "smaller"


def _graded(sample: Sample, answers: Sequence[_Answer], metric: Metric) -> Outcome:
    scores = [metric.score(answer.text, sample.accepted_answers(answer.turn)) for answer in answers]
    score = metric.over_turns(scores)
    text = "\n".join(answer.text for answer in answers)
    kept, vision = (statistics.fmean(getattr(answer.shares, name) for answer in answers) for name in ("kept", "vision"))
    read = [answer.shares.read for answer in answers if answer.shares.read is not None]
    return Outcome(score, kept, vision, statistics.fmean(read) if read else None, text=None if score == 1 else text)


def _limit(conversation: Conversation, turn: int) -> int:
    return int(1.5 * len(conversation.answers[turn].tokens)) + MARGIN


def _text(processor: Any, tokens: Any) -> str:
    return str(processor.decode(tokens, skip_special_tokens=True)).strip()


def _generate_batch(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample], variant: Variant, limit: int | None
) -> list[_Answer]:
    """Answer samples of one turn together; an answer may be as long as the longest reference allows."""
    shown = [blank(sample) for sample in samples] if variant.images == "blank" else list(samples)
    inputs = on_device(model, batch_inputs(processor, shown))
    ends = end_tokens(model, processor)
    longest = limit or max(_limit(encode(processor, sample, ends), 0) for sample in samples)
    with prune(model, variant.config) as run:
        output = generate_greedily(model, inputs, longest)
    answers = output[:, inputs["input_ids"].shape[1] :]
    shares = _shares(run.report)
    return [_Answer(0, _text(processor, tokens), own) for tokens, own in zip(answers, shares, strict=True)]


def _generate_alone(
    model: PreTrainedModel, processor: Any, sample: Sample, variant: Variant, limit: int | None
) -> list[_Answer]:
    """Read the first prompt, evict, go on with the reference history, and generate on the same cache."""
    conversation = encode(processor, sample, end_tokens(model, processor))
    [group] = groups_of(model, processor, sample, [variant], 1)
    prompt, config = on_device(model, group.inputs), group.variants[0].config
    answers = []
    for turn, span in enumerate(conversation.answers):
        if not span.scored:
            continue
        cache = PrunedCache.for_inputs(model, prompt, config)
        ids = torch.cat([prompt["input_ids"], conversation.draft[None, : span.start].to(model.device)], 1)
        inputs = prompt
        with torch.inference_mode(), interpolated_positions(model) if group.interpolated else nullcontext():
            if span.start:  # generate finds the prompt in the cache, and reads only the history
                model(**prompt, **passed(cache))
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            output = generate_greedily(model, {**inputs, **passed(cache)}, limit or _limit(conversation, turn))
        [shares] = _shares(cache.report(), group.share)
        answers.append(_Answer(turn, _text(processor, output[0, ids.shape[1] :]), shares))
    return answers


def _shares(report: PruneReport, of_sample: float = 1.0) -> list[Shares]:
    """What each row kept of the first prompt, whose vision tokens are a fraction of those of the sample as it is.

    Raises
    ------
    NonFiniteAttentionError
        If the attention of a row held NaN or inf: it has an answer, but none that a method can be judged by.
    """
    if not report.prompts:
        return [Shares(of_sample, of_sample, of_sample)] * report.batch
    shares = []
    for row in range(report.batch):
        layers = [layer.rows[row] for layer in report.prompts[0].layers]
        if any(layer.layer_class == "non-finite" for layer in layers):
            raise NonFiniteAttentionError(f"The attention of row {row} of the batch holds NaN or inf.")
        total = sum(layer.vision_tokens * len(layer.kept) for layer in layers)
        # Layer by layer in whole entries, as those of models with layers of several shapes are.
        held = sum(layer.vision_held * layer.vision_tokens * len(layer.kept) for layer in layers)
        held -= sum(sum(map(len, layer.evicted_text)) for layer in layers)
        kept, vision = (held / total, sum(sum(layer.kept) for layer in layers) / total) if total else (1.0, 1.0)
        read = of_sample * kept if report.config.get("read", 1.0) == 1 else None
        shares.append(Shares(of_sample * kept, of_sample * vision, read))
    return shares
