# SPDX-License-Identifier: Apache-2.0
"""A sample and many variants: is the answer right, how far, and how close does each stay to the full cache?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from plphp.evaluation.settings import FULL, ROWS
from plphp.settings.checks import check_int

from .conversation import AnswerSpan, Conversation, encode, end_tokens, prompt_inputs
from .forcing import Forced, force, greedy_answer, groups_of
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.evaluation.tasks.task import Sample

LABEL_FREE_TOKENS = 128
"""New tokens of the full cache's answer that variants are compared on, where no limit is given."""


@dataclass(frozen=True)
class Outcome:
    """What a variant made of a sample.

    Parameters
    ----------
    score : float, optional
        Score by the task's metric, in [0, 1]; None where no answer is scored.
    kept : float
        Bytes held of the vision KV, as a fraction of the full cache's over layers and KV heads; codes with all that
        they need but codebooks; evicted text counts like evicted vision entries.
    vision_kept : float
        Vision entries held in any way, as a fraction of the full cache's: above ``kept`` where text left or entries are
        held in few bits.
    read : float, optional
        Vision KV that a decoding step reads, measured as ``kept``; None where it is not measured.
    right_tokens, tokens : int, optional
        Tokens of the scored answers that are right before the first error, and how many there are.
    text : str, optional
        The answer, where it is not the reference; when verified, up to the first token that deviates.
    agreement : float, optional
        Share of the positions of the full cache's greedy answer, its first token aside, at which this variant's most
        probable token is the same; None where there is no such position.
    kl : float, optional
        Mean Kullback-Leibler divergence from the full cache's distribution over the same positions, in nats.
    held : tuple of float, optional
        Where images arrive over the turns, the bytes held of the vision KV after each turn, as a fraction of what the
        full cache holds after the last; ``kept`` is the largest.
    """

    score: float | None
    kept: float
    vision_kept: float
    read: float | None = None
    right_tokens: int | None = None
    tokens: int | None = None
    text: str | None = None
    agreement: float | None = None
    kl: float | None = None
    held: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured as JSON-ready values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def verify(
    model: PreTrainedModel, processor: Any, sample: Sample, variants: Sequence[Variant], *, rows: int = ROWS
) -> dict[str, Outcome]:
    """Say for every variant whether greedy decoding would give the reference answers, from one pass over them.

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
        The first is ``full``, from which agreement and divergence are measured: over the positions up to where
        the full cache itself leaves the reference.
    rows : int
        Variants whose caches are alive at a time.

    Returns
    -------
    dict
        Outcome by the name of the variant.
    """
    conversation = encode(processor, sample, end_tokens(model, processor))
    positions = [position for answer in conversation.scored for position in _positions(answer)]
    forced = force(model, groups_of(model, processor, sample, variants, rows), conversation.draft, positions)
    return graded(processor, conversation, forced)


def graded(processor: Any, conversation: Conversation, forced: Mapping[str, Forced]) -> dict[str, Outcome]:
    """Compare what variants would say with the reference answers of the scored turns, and with the full cache.

    Parameters
    ----------
    processor : ProcessorMixin
    conversation : Conversation
    forced : mapping
        By the name of the variant, what it would say at each token of the scored answers, in order.

    Returns
    -------
    dict
        Outcome by the name of the variant.
    """
    positions = [position for answer in conversation.scored for position in _positions(answer)]
    full = forced[FULL]
    compared = _right_tokens(conversation, full) + 1
    outcomes = {}
    for name, answer in forced.items():
        right = _right_tokens(conversation, answer)
        agreement, kl = _closeness(answer, full.tokens, positions, compared)
        outcomes[name] = Outcome(
            score=float(right == len(positions)),
            kept=answer.shares.kept,
            vision_kept=answer.shares.vision,
            read=answer.shares.read,
            right_tokens=right,
            tokens=len(positions),
            text=None if right == len(positions) else _wrong_answer(processor, conversation, answer, right),
            agreement=agreement,
            kl=kl,
            held=answer.held or None,
        )
    return outcomes


def label_free(
    model: PreTrainedModel,
    processor: Any,
    sample: Sample,
    variants: Sequence[Variant],
    *,
    rows: int = ROWS,
    max_new_tokens: int = LABEL_FREE_TOKENS,
) -> dict[str, Outcome]:
    """Say how close every variant stays to the full cache on the full cache's own greedy answer.

    The reference answer of the last turn is not read.

    Parameters
    ----------
    model, processor, sample, variants, rows
        See `verify`.
    max_new_tokens : int
        Longest greedy answer to the last question.

    Returns
    -------
    dict
        Outcome by the name of the variant, without a score.
    """
    check_int("max_new_tokens", max_new_tokens, minimum=1)
    history = torch.empty(0, dtype=torch.int64)
    if len(sample.turns) > 1:
        conversation = encode(processor, sample, end_tokens(model, processor))
        history = conversation.draft[: conversation.answers[-1].start]
    answer = greedy_answer(model, prompt_inputs(processor, sample, len(sample.turns)), max_new_tokens)
    positions = list(range(len(history), len(history) + len(answer)))
    draft = torch.cat([history, torch.tensor(answer, dtype=torch.int64)])
    forced = force(model, groups_of(model, processor, sample, variants, rows), draft, positions)
    outcomes = {}
    for name, variant in forced.items():
        agreement, kl = _closeness(variant, answer, positions, len(positions))
        shares = variant.shares
        outcomes[name] = Outcome(None, shares.kept, shares.vision, shares.read, agreement=agreement, kl=kl)
    return outcomes


def _positions(answer: AnswerSpan) -> range:
    return range(answer.start, answer.start + len(answer.tokens))


def _right_tokens(conversation: Conversation, forced: Forced) -> int:
    """Scored tokens before the first that is wrong; any end token will do where an answer ends."""
    right = 0
    for answer in conversation.scored:
        for number, expected in enumerate(answer.tokens):
            token = forced.tokens[right]
            is_end = number == len(answer.tokens) - 1
            if token != expected and not (is_end and token in conversation.ends):
                return right
            right += 1
    return right


def _wrong_answer(processor: Any, conversation: Conversation, forced: Forced, right: int) -> str:
    """The first wrong answer, up to the token that makes it wrong."""
    before = 0
    for answer in conversation.scored:
        if right < before + len(answer.tokens):
            tokens = [*answer.tokens[: right - before], forced.tokens[right]]
            return str(processor.decode(tokens, skip_special_tokens=True)).strip()
        before += len(answer.tokens)
    raise AssertionError("called for an answer that is right")


def _closeness(
    forced: Forced, answer: Sequence[int], positions: Sequence[int], compared: int
) -> tuple[float | None, float | None]:
    """Agreement and mean divergence over the first ``compared`` positions; None where none of them counts."""
    # The very first token comes out of the prompt before anything is evicted: it is the same for every variant.
    counting = [number for number, position in enumerate(positions[:compared]) if position > 0]
    if not counting:
        return None, None
    agreeing = sum(forced.tokens[number] == answer[number] for number in counting)
    return agreeing / len(counting), sum(forced.kl[number] for number in counting) / len(counting)
