# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing on pruned caches: what each variant would say next at every position of the same text.

Greedy decoding gives a text if and only if the most probable token at each of its positions is the text's next.
So one pass over a draft says, for many variants at once, what ``generate`` would show token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plphp.engines.hf.branching import Branches, branch
from plphp.engines.hf.cache_argument import passed
from plphp.inputs.prompt import count_vision_tokens, on_device
from plphp.settings.checks import check_int

from .controls import blank, interpolated_positions, smaller_inputs
from .conversation import prompt_inputs
from .shares import Shares, UnreadShares
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.evaluation.tasks.task import Sample

MAX_LOGITS = 2**25
"""Logits that may be alive at a time (128 MiB in float32); a longer draft is fed in pieces."""


@dataclass(frozen=True)
class Group:
    """Variants that read the same inputs.

    Parameters
    ----------
    inputs : dict
        Inputs of the model.
    variants : tuple of Variant
        They differ in their configs.
    share : float
        Vision tokens of the inputs, over those of the sample as it is.
    interpolated : bool
        Whether the vision tower takes another size than its own.
    """

    inputs: dict[str, Any]
    variants: tuple[Variant, ...]
    share: float = 1.0
    interpolated: bool = False


@dataclass(frozen=True)
class Forced:
    """What a variant would say at some positions of a draft.

    Parameters
    ----------
    tokens : tuple of int
        The most probable token at each position.
    kl : tuple of float
        Kullback-Leibler divergence from the full cache's distribution at each position, in nats.
    shares : Shares
        What it kept of the prompt.
    held : tuple of float
        See `plphp.evaluation.running.scoring.Outcome`; empty where all images stand before the first question.
    """

    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    shares: Shares
    held: tuple[float, ...] = ()


def groups_of(
    model: PreTrainedModel, processor: Any, sample: Sample, variants: Sequence[Variant], rows: int
) -> list[Group]:
    """Sort variants by the inputs that they read, at most ``rows`` in a group, in their order."""
    check_int("rows", rows, minimum=1)
    plain = prompt_inputs(processor, sample)
    variants = [variant.for_sample(sample) for variant in variants]
    groups = []
    kept_as_is = [variant for variant in variants if variant.images == "as they are"]
    for start in range(0, len(kept_as_is), rows):
        groups.append(Group(plain, tuple(kept_as_is[start : start + rows])))
    for variant in variants:
        if variant.images == "blank":
            groups.append(Group(prompt_inputs(processor, blank(sample)), (variant,)))
        elif variant.images == "smaller":
            inputs = smaller_inputs(model, processor, sample, variant.retention or 1.0, plain)
            share = count_vision_tokens(model.config, inputs) / count_vision_tokens(model.config, plain)
            groups.append(Group(inputs, (variant,), share, interpolated=True))
    return groups


@torch.inference_mode()
def force(
    model: PreTrainedModel, groups: Sequence[Group], draft: Tensor, positions: Sequence[int]
) -> dict[str, Forced]:
    """Feed a draft to every variant and note what each would say next.

    Parameters
    ----------
    model : PreTrainedModel
    groups : sequence of Group
        The first variant of the first group is the full cache, from which the divergences are measured.
    draft : Tensor
        int64 [draft]; the text after the prompt.
    positions : sequence of int
        Ascending; position p comes after the prompt and the first p tokens of the draft.

    Returns
    -------
    dict
        By the name of the variant.
    """
    draft = draft[: positions[-1]].to(model.device)
    reference: dict[int, Tensor] = {}
    forced: dict[str, Forced] = {}
    for group in groups:
        branches, shares = _read(model, group, draft)
        unread = UnreadShares(branches, count_vision_tokens(model.config, group.inputs))
        tokens, divergences = [], []
        for position, logits in _next_logits(model, branches, draft, positions, len(group.variants), unread):
            probabilities = logits.float().log_softmax(-1)
            full = reference.setdefault(position, probabilities[0].clone())
            tokens.append(logits.argmax(-1))
            divergences.append((full.exp() * (full - probabilities)).sum(-1).clamp(min=0))
        token_rows = torch.stack(tokens, 1).tolist()
        divergence_rows = torch.stack(divergences, 1).tolist()
        shares = unread.taken_off(shares, group.share)
        for row, variant in enumerate(group.variants):
            forced[variant.name] = Forced(tuple(token_rows[row]), tuple(divergence_rows[row]), shares[row])
    return forced


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    group: Group,
    history: Tensor,
    answer: Tensor,
    ends: Sequence[int],
    max_new_tokens: int,
) -> dict[str, tuple[list[int], Shares]]:
    """Let the variants of a group answer, all rows of one cache, each with its own greedy tokens.

    Parameters
    ----------
    model : PreTrainedModel
    group : Group
        What is read.
    history : Tensor
        int64 [history]; what follows the prompt before the answer: empty for a first turn.
    answer : Tensor
        int64 [answer]; the reference, which only the method ``oracle`` looks at.
    ends : sequence of int
        Tokens that end an answer.
    max_new_tokens : int
        Longest answer.

    Returns
    -------
    dict
        By the name of the variant: tokens without the end token, and what was kept.
    """
    history, rows = history.to(model.device), len(group.variants)
    branches, shares = _read(model, group, torch.cat([history, answer.to(model.device)]))
    unread = UnreadShares(branches, count_vision_tokens(model.config, group.inputs))
    logits = branches.logits
    if len(history):
        [(_, logits)] = _next_logits(model, branches, history, [len(history)], rows, unread)
    answers: list[list[int]] = [[] for _ in range(rows)]
    running = set(range(rows))
    for step in range(max_new_tokens):
        greedy = logits.argmax(-1)
        tokens = greedy.tolist()
        running -= {row for row in running if tokens[row] in ends}
        for row in running:
            answers[row].append(tokens[row])
        if not running or step == max_new_tokens - 1:
            break
        with unread.counted(1, running):  # what a row that has ended goes on reading is no part of its answer
            output: Any = model(input_ids=greedy[:, None], **passed(branches.cache))
        logits = output.logits[:, -1]
    shares = unread.taken_off(shares, group.share)
    return {variant.name: (answers[row], shares[row]) for row, variant in enumerate(group.variants)}


def _read(model: PreTrainedModel, group: Group, answer: Tensor) -> tuple[Branches, list[Shares]]:
    """Read the prompt of a group once, with a row for each of its variants; also return what each kept.

    The method ``oracle`` ranks by all tokens of ``answer``: the last token of ``answer_ids`` is never read, so that the
    answer's last is repeated after it.
    """
    inputs = on_device(model, group.inputs)
    with interpolated_positions(model) if group.interpolated else nullcontext():
        configs = [variant.config for variant in group.variants]
        branches = branch(model, inputs, configs, answer_ids=torch.cat([answer, answer[-1:]]) if len(answer) else None)
    # Without vision tokens nothing is evicted: 1 - kept is 0, whatever it is multiplied by.
    tokens_per_vision = inputs["input_ids"].shape[1] / max(1, count_vision_tokens(model.config, inputs))
    kept_of_vision = [1 - round((1 - kept) * tokens_per_vision, 12) for kept in branches.kept]
    return branches, [
        Shares(group.share * kept, group.share * vision, group.share * kept)
        for kept, vision in zip(kept_of_vision, branches.vision_kept, strict=True)
    ]


def _next_logits(
    model: PreTrainedModel,
    branches: Branches,
    draft: Tensor,
    positions: Sequence[int],
    rows: int,
    unread: UnreadShares,
) -> Iterator[tuple[int, Tensor]]:
    """Logits [rows, vocab] at each position, in order."""
    asked = frozenset(positions)
    if 0 in asked:
        yield 0, branches.logits
    piece = max(1, MAX_LOGITS // (rows * branches.logits.shape[-1]))
    for start in range(0, len(draft), piece):
        ids = draft[start : start + piece].expand(rows, -1)
        with unread.counted(ids.shape[1]):
            output: Any = model(input_ids=ids, **passed(branches.cache))
        for offset in range(ids.shape[1]):
            if start + offset + 1 in asked:
                yield start + offset + 1, output.logits[:, offset]


def greedy_answer(model: PreTrainedModel, inputs: Mapping[str, Any], max_new_tokens: int) -> list[int]:
    """What the model answers with a full cache: greedy tokens, the end token included."""
    output = generate_greedily(model, on_device(model, inputs), max_new_tokens)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def generate_greedily(model: PreTrainedModel, inputs: Mapping[str, Any], max_new_tokens: int) -> Tensor:
    """Run the model's own ``generate`` without sampling and beams.

    Parameters
    ----------
    model : PreTrainedModel
    inputs : mapping
        What ``generate`` takes, on the model's device, with a cache if there is one.
    max_new_tokens : int
        Longest answer.

    Returns
    -------
    Tensor
        int64 [batch, seq]; prompt and answer.
    """
    generate: Any = model.generate
    with torch.inference_mode():
        tokens: Tensor = generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    return tokens
