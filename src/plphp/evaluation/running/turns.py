# SPDX-License-Identifier: Apache-2.0
"""Conversations whose images arrive over the turns: each variant reads them on a cache of its own, turn after turn."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.inputs.prompt import count_vision_tokens, on_device

from .controls import blank
from .conversation import Conversation, encode, end_tokens, prompt_inputs
from .forcing import Forced
from .scoring import Outcome, graded
from .shares import HeldVision, Shares
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.evaluation.tasks.task import Sample

Prompts = list[dict[str, Any]]
"""For each turn the inputs of the whole conversation up to its question."""


def verify_turns(
    model: PreTrainedModel, processor: Any, sample: Sample, variants: Sequence[Variant]
) -> dict[str, Outcome]:
    """Say for every variant whether greedy decoding would give the reference answers of the scored turns.

    The images of a turn are read with its question, and then its reference answer: what a variant has made of the cache
    by then it goes on with.

    Parameters
    ----------
    model, processor, sample
        See `plphp.evaluation.running.scoring.verify`.
    variants : sequence of Variant
        The first is ``full``, from which divergences and shares are measured.

    Returns
    -------
    dict
        Outcome by the name of the variant; its ``kept`` is the largest of ``held``.
    """
    conversation = encode(processor, sample, end_tokens(model, processor))
    seen = _prompts(model, processor, sample)
    vision = [count_vision_tokens(model.config, prompt) for prompt in seen]
    unseen = _prompts(model, processor, blank(sample)) if any(one.images == "blank" for one in variants) else []
    forced: dict[str, Forced] = {}
    reference, full = None, 0
    for variant in variants:
        own = variant.for_sample(sample)
        if own.budget_share is not None:
            own = own.with_budget(full)
        logits, held = _read(model, unseen if own.images == "blank" else seen, vision, conversation, own)
        probabilities = logits.float().log_softmax(-1)
        if reference is None:
            reference, full = probabilities, held[-1].full
        divergences = (reference.exp() * (reference - probabilities)).sum(-1).clamp(min=0)
        shares = tuple(round(turn.nbytes / full, 6) for turn in held)
        kept = Shares(max(shares), held[-1].entries, max(shares) if own.config.read == 1 else None)
        forced[own.name] = Forced(tuple(logits.argmax(-1).tolist()), tuple(divergences.tolist()), kept, shares)
    return graded(processor, conversation, forced)


def _prompts(model: PreTrainedModel, processor: Any, sample: Sample) -> Prompts:
    return [on_device(model, prompt_inputs(processor, sample, turn + 1)) for turn in range(len(sample.turns))]


@torch.inference_mode()
def _read(
    model: PreTrainedModel, prompts: Prompts, vision: Sequence[int], conversation: Conversation, variant: Variant
) -> tuple[Tensor, list[HeldVision]]:
    """Read a conversation.

    Returns
    -------
    logits : Tensor
        [scored, vocab]; before each token of the scored answers.
    held : list of HeldVision
        After each turn.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = PrunedCache.for_inputs(model, prompts[0], variant.config)
    logits, held = [], []
    for prompt, tokens, answer in zip(prompts, vision, conversation.answers, strict=True):
        turn = cache.model_inputs(cache.plan(prompt))
        with cache.tower_recorded():
            asked: Any = model(**{**turn, **last}, **passed(cache))
        said = [asked.logits[0, -1:]]
        if len(answer.tokens) > 1:
            ids = torch.tensor([answer.tokens[:-1]], device=model.device)
            output: Any = model(input_ids=ids, **passed(cache))
            said.append(output.logits[0])
        logits += said if answer.scored else []
        held.append(HeldVision.of(cache, tokens))
    return torch.cat(logits), held
