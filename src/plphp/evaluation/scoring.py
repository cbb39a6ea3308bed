# SPDX-License-Identifier: Apache-2.0
"""One sample, many variants: is the answer right, how far, and how close does each stay to the full cache?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .conversation import AnswerSpan, Conversation, encode, end_tokens, prompt_inputs
from .forcing import Forced, force, greedy_answer, groups_of
from .variants import FULL, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .tasks import Sample

ROWS = 64
"""Variants whose caches are alive at a time."""


@dataclass(frozen=True)
class Outcome:
    """What one variant made of one sample.

    Parameters
    ----------
    score : float, optional
        Of the task's metric, in [0, 1]; None where no answer is asked for.
    kept : float
        Vision KV kept, measured: a fraction of the full cache's vision entries over layers and KV heads; evicted text
        counts like evicted vision entries.
    right_tokens, tokens : int, optional
        Tokens of the scored answers that are right before the first error, and how many there are.
    text : str, optional
        The answer, where it is not the reference; when verified, up to the first token that deviates.
    agreement : float, optional
        Share of the places of the full cache's greedy answer, its first token aside, at which this variant's most
        probable token is the same; None where there is no such place.
    kl : float, optional
        Mean Kullback-Leibler divergence from the full cache's distribution over the same places, in nats.
    """

    score: float | None
    kept: float
    right_tokens: int | None = None
    tokens: int | None = None
    text: str | None = None
    agreement: float | None = None
    kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of it as JSON-ready values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def verify(
    model: PreTrainedModel, processor: Any, sample: Sample, variants: Sequence[Variant], *, rows: int = ROWS
) -> dict[str, Outcome]:
    """Tell for every variant whether greedy decoding would give the reference answers, from one pass over them.

    For a dialogue the history is the reference's: each scored turn is judged after the reference answers of those
    before it, on the cache of the first turn's prompt.

    Parameters
    ----------
    model : PreTrainedModel
        A supported model, in evaluation mode.
    processor : ProcessorMixin
        Its processor.
    sample : Sample
        Images and turns.
    variants : sequence of Variant
        The first is ``full``, from which agreement and divergence are measured: over the places up to where
        the full cache itself leaves the reference.
    rows : int
        Variants whose caches are alive at a time.

    Returns
    -------
    dict
        Outcome by the name of the variant.
    """
    conversation = encode(processor, sample, end_tokens(model, processor))
    places = [place for answer in conversation.scored for place in _places(answer)]
    found = force(model, groups_of(model, processor, sample, variants, rows), conversation.draft, places)
    full = found[FULL]
    compared = _right_tokens(conversation, full) + 1
    outcomes = {}
    for name, forced in found.items():
        right = _right_tokens(conversation, forced)
        agreement, kl = _closeness(forced, full.tokens, places, compared)
        outcomes[name] = Outcome(
            score=float(right == len(places)),
            kept=forced.kept,
            right_tokens=right,
            tokens=len(places),
            text=None if right == len(places) else _said(processor, conversation, forced, right),
            agreement=agreement,
            kl=kl,
        )
    return outcomes


def label_free(
    model: PreTrainedModel,
    processor: Any,
    sample: Sample,
    variants: Sequence[Variant],
    *,
    rows: int = ROWS,
    max_new_tokens: int = 128,
) -> dict[str, Outcome]:
    """Tell how close every variant stays to the full cache on the full cache's own greedy answer.

    Takes what `verify` takes; the answer of the last turn is not read. Positions are those of the full cache's
    greedy answer to the last question, up to ``max_new_tokens``.
    """
    before, ends = torch.empty(0, dtype=torch.int64), end_tokens(model, processor)
    if len(sample.turns) > 1:
        conversation = encode(processor, sample, ends)
        before = conversation.draft[: conversation.answers[-1].start]
    answer = greedy_answer(model, prompt_inputs(processor, sample, len(sample.turns)), max_new_tokens)
    places = list(range(len(before), len(before) + len(answer)))
    draft = torch.cat([before, torch.tensor(answer, dtype=torch.int64)])
    found = force(model, groups_of(model, processor, sample, variants, rows), draft, places)
    outcomes = {}
    for name, forced in found.items():
        agreement, kl = _closeness(forced, answer, places, len(places))
        outcomes[name] = Outcome(None, forced.kept, agreement=agreement, kl=kl)
    return outcomes


def _places(answer: AnswerSpan) -> range:
    return range(answer.start, answer.start + len(answer.tokens))


def _right_tokens(conversation: Conversation, forced: Forced) -> int:
    """Scored tokens before the first that is wrong; any end token will do where an answer ends."""
    right = 0
    for answer in conversation.scored:
        for number, token in enumerate(answer.tokens):
            given = forced.tokens[right]
            is_end = number == len(answer.tokens) - 1
            if given != token and not (is_end and given in conversation.ends):
                return right
            right += 1
    return right


def _said(processor: Any, conversation: Conversation, forced: Forced, right: int) -> str:
    """The first wrong answer, up to the token that makes it wrong."""
    done = 0
    for answer in conversation.scored:
        if right < done + len(answer.tokens):
            said = [*answer.tokens[: right - done], forced.tokens[right]]
            return str(processor.decode(said, skip_special_tokens=True)).strip()
        done += len(answer.tokens)
    raise AssertionError("called for an answer that is right")


def _closeness(
    forced: Forced, answer: Sequence[int], places: Sequence[int], compared: int
) -> tuple[float | None, float | None]:
    """Agreement and mean divergence over the first ``compared`` places; the very first token, which comes out of the
    prompt before anything is evicted, does not count."""
    chosen = [number for number, place in enumerate(places[:compared]) if place > 0]
    if not chosen:
        return None, None
    agreeing = sum(forced.tokens[number] == answer[number] for number in chosen)
    return agreeing / len(chosen), sum(forced.kl[number] for number in chosen) / len(chosen)
