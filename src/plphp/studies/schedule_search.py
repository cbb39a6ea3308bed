# SPDX-License-Identifier: Apache-2.0
"""A schedule of vision tokens that leave inside prefill, searched for on a few prompts (G-Search, arXiv:2412.00556).

The layers are gone through from the first to the last. At each the search looks for the least share of the vision
tokens that may go on, with no further drop behind it, so that the model's answers stay as they are: the mean, over all
tokens of all answers, of the KL divergence of the next-token distribution from the full model's. What may be lost by
the i-th of n layers is i / n of the tolerance, so that the first layer does not spend all of it (ours).

Where a method says so (``groups``, ours), that is done at the first layers of so many groups of layers of equal length
alone: what a search takes grows with the groups, and not with the depth of the model.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plphp.engines.hf.cache import NOTHING_EVICTED, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.errors import ConfigError
from plphp.methods.registry import resolve
from plphp.settings.config import DEFAULT_RATE, PLPHPConfig

ANSWER = 16
"""Longest part of an answer that is compared, in tokens."""
STEPS = 20
"""Shares are multiples of 1 / 20."""

TRIES = STEPS.bit_length()
"""Most schedules that are tried at a layer."""

Schedule = Mapping[int, float]
"""By the layers before which tokens leave, the share of the vision tokens that goes on."""


@dataclass(frozen=True)
class FullAnswer:
    """What the full model answers to a prompt.

    Parameters
    ----------
    inputs : mapping
        The prompt.
    tokens : Tensor
        int64 [1, answer]; its greedy answer.
    log_probabilities : Tensor
        float32 [answer, vocab], on the CPU; the distribution at each token of the answer.
    """

    inputs: Mapping[str, Any]
    tokens: Tensor
    log_probabilities: Tensor


def search_schedule(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    config: PLPHPConfig,
    *,
    progress: Callable[[str], None] = lambda step: None,
) -> PLPHPConfig:
    """Search for the schedule of a method that takes one (`plphp.policy.method.Method.with_schedule`).

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    prompts : iterable of mapping
        Inputs of ``generate`` with one row, without padding, each with an image or more. Each is answered once by the
        full model, and read as often as `most_readings` says at most.
    config : PLPHPConfig
        The method, with its tolerance. All further settings are taken over.
    progress : callable
        Told what is going on, in a few words.

    Returns
    -------
    PLPHPConfig
        With the schedule, and without a rate, which the schedule takes the place of.

    Raises
    ------
    ConfigError
        If the method takes no schedule, the config has a rate, a prompt has several rows or no vision token, or
        nothing can leave within the tolerance.
    """
    method = resolve(config)
    if method.with_schedule is None:
        raise ConfigError(f"The method {config.method!r} takes no schedule: search for that of 'g_search'.")
    if config.base_rate != DEFAULT_RATE:
        raise ConfigError(
            f"A search for a schedule finds how much can leave, and takes no rate, got {config.base_rate:g}: leave it "
            "out, and set the tolerance."
        )
    config = dataclasses.replace(config, target_retention=None)
    with_schedule = partial(method.with_schedule, config)
    answers, first, layers = _answers(model, prompts, progress)
    tolerance = method.settings(config)["tolerance"]
    schedule: dict[int, float] = {}
    begins = searched_layers(config, first, layers)
    for number, layer in enumerate(begins, 1):
        progress(f"layer {layer} of {layers}")
        schedule |= _least(model, answers, layer, schedule, with_schedule, tolerance * number / len(begins))
    if not schedule:
        raise ConfigError(
            f"Within the tolerance of {tolerance:g} nats no vision token can leave: give a larger one, as in "
            f"{config.method}:tolerance={max(0.05, 2 * tolerance):g}."
        )
    return dataclasses.replace(with_schedule(schedule), calibrated_layers=layers)


def searched_layers(config: PLPHPConfig, first: int, layers: int) -> list[int]:
    """The layers that a search lets tokens leave before: the first of each group of layers.

    Parameters
    ----------
    config : PLPHPConfig
        Of a method that takes a schedule.
    first, layers : int
        The first layer that tokens can leave before, and the number of decoder layers.
    """
    number = layers - first
    groups: int = min(number, resolve(config).settings(config).get("groups", number))
    return [first + group * number // groups for group in range(groups)]


def most_readings(config: PLPHPConfig, layers: int) -> int:
    """How often a search reads each prompt at most, besides its answer by the full model.

    Parameters
    ----------
    config : PLPHPConfig
        Of a method that takes a schedule.
    layers : int
        Decoder layers of the model.
    """
    return 1 + TRIES * len(searched_layers(config, 1, layers))


def _least(
    model: PreTrainedModel,
    answers: Sequence[FullAnswer],
    layer: int,
    schedule: Schedule,
    with_schedule: Callable[[Schedule], PLPHPConfig],
    allowed: float,
) -> Schedule:
    """The least share that may go on at a layer, behind those of a schedule; nothing where no more can leave."""
    share = round(min(schedule.values(), default=1.0) * STEPS)

    def is_within(steps: int) -> bool:
        return _divergence(model, answers, with_schedule({**schedule, layer: steps / STEPS})) <= allowed

    least = bisect_left(range(share), True, key=is_within)  # more tokens are taken to diverge less
    return {layer: least / STEPS} if least < share else {}


def _answers(
    model: PreTrainedModel, prompts: Iterable[Mapping[str, Any]], progress: Callable[[str], None]
) -> tuple[list[FullAnswer], int, int]:
    """The full model's answers, the first layer that tokens can leave before, and the number of decoder layers."""
    answers, first, layers = [], 1, 1
    for number, inputs in enumerate(prompts, 1):
        progress(f"answer {number}")
        if len(inputs["input_ids"]) > 1:
            raise ConfigError(
                f"Prompt {number} has {len(inputs['input_ids'])} rows: a search takes prompts of one row."
            )
        generate: Any = model.generate
        output = generate(**inputs, max_new_tokens=ANSWER, do_sample=False, num_beams=1, num_return_sequences=1)
        tokens = output[:, inputs["input_ids"].shape[1] :]
        cache = PrunedCache.for_inputs(model, inputs, NOTHING_EVICTED)
        answers.append(FullAnswer(inputs, tokens, _log_probabilities(model, inputs, cache, tokens).cpu()))
        report, layers = cache.report(), len(cache.layers)
        if not report.prompts:
            raise ConfigError(
                f"Prompt {number} has no vision token, and a search is for those that have: leave it out."
            )
        first = report.prompts[0].layers[0].layer + 1  # behind the first layer with full attention, which ranks
        del cache  # the model is as it was when no cache is left
    if not answers:
        raise ConfigError("No prompt was given: a search needs at least one.")
    return answers, first, layers


def _divergence(model: PreTrainedModel, answers: Iterable[FullAnswer], config: PLPHPConfig) -> float:
    """Mean KL divergence from the full model's distributions over all tokens of the answers, in nats."""
    total, tokens = [], 0
    for answer in answers:
        cache = PrunedCache.for_inputs(model, answer.inputs, config)
        pruned = _log_probabilities(model, answer.inputs, cache, answer.tokens)
        full = answer.log_probabilities.to(pruned.device)
        total.append(float((full.exp() * (full - pruned)).sum()))
        tokens += len(full)
        del cache  # as above
    return math.fsum(total) / tokens


@torch.no_grad()
def _log_probabilities(model: Any, inputs: Mapping[str, Any], cache: PrunedCache, answer: Tensor) -> Tensor:
    """The distribution at each token of an answer [1, answer] behind a prompt, float32 [answer, vocab]."""
    logits = [model(**inputs, **passed(cache)).logits[0, -1:]]
    if answer.shape[1] > 1:
        logits.append(model(input_ids=answer[:, :-1], **passed(cache)).logits[0])
    return torch.cat(logits).float().log_softmax(-1)
