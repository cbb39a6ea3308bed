# SPDX-License-Identifier: Apache-2.0
"""The queries of a model's own answers, for the method that asks with them what an answer will look at."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.rotation_probe import find_rotations
from plphp.errors import ConfigError
from plphp.policy.bank import LayerBank, QueryBank
from plphp.policy.rotation import Rotation
from plphp.pruning.scoring import Attended
from plphp.settings.config import PLPHPConfig

from .provenance import provenance


class _Reservoir:
    """A uniform sample of the tokens of all answers, whose number is not known beforehand: the same for all layers."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.ahead: dict[int, int] = {}
        self.queries: dict[int, dict[int, Tensor]] = {}
        self._seen: dict[int, int] = {}
        self._places: list[int] = []
        self._random = random.Random(seed)

    @property
    def seen(self) -> int:
        """Tokens of answers so far."""
        return max(self._seen.values(), default=0)

    def add(self, layer: int, ahead: int, query: Tensor) -> None:
        """Take the next query [q_heads, dim] of a layer, or let it go."""
        number = self._seen.get(layer, 0)
        self._seen[layer] = number + 1
        if number == len(self._places):
            self._places.append(number if number < self.size else self._random.randrange(number + 1))
        place = self._places[number]
        if place < self.size:
            self.ahead[place] = ahead
            self.queries.setdefault(place, {})[layer] = query.cpu()


class _Listener:
    """Hears the queries that the answer to one prompt is written with, and rotates them back to position 0."""

    def __init__(self, cache: PrunedCache, reservoir: _Reservoir, rotations: Mapping[int, Rotation]) -> None:
        self.cache, self.reservoir, self.rotations = cache, reservoir, rotations
        self.prompt_length = 0

    def __call__(self, attended: Attended) -> None:
        if self.cache.reading is not None:
            self.prompt_length = attended.entries.length
            return
        turn = self.cache.turn
        delta = 0 if turn is None else int(turn.after[0])
        for column, position in enumerate(range(attended.begin, attended.entries.length)):
            query = attended.query[0, :, column]
            unrotated = self.rotations[attended.layer].rotated(query, -(position + delta))
            self.reservoir.add(attended.layer, position - self.prompt_length, unrotated)


def collect_query_bank(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    *,
    samples: int = 400,
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
) -> QueryBank:
    """Let a model answer prompts greedily, unpruned, and keep a sample of the queries that it wrote its answers with.

    Take prompts like those that will be pruned, but others: a few dozen.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    prompts : iterable of mapping
        Inputs of ``generate`` with one row, without padding, and with at least one vision token.
    samples : int
        Tokens of answers whose queries are kept, at random; all if there are fewer.
    max_new_tokens : int
        Longest answer.
    seed : int
        Of the sample.
    progress : callable
        Told what is going on, in a few words.

    Returns
    -------
    QueryBank
        Save it for the option ``bank`` of the method ``query_bank``.

    Raises
    ------
    ConfigError
        If a prompt has several rows or no vision token, or no answer has a second token.
    UnsupportedModelError
        If it is not known how the model rotates its queries, see `plphp.engines.hf.rotation_probe.find_rotations`.

    Examples
    --------
    >>> plphp.collect_query_bank(model, prompts).save("bank.safetensors")  # doctest: +SKIP
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}.")
    rotations = find_rotations(model)
    reservoir = _Reservoir(samples, seed)
    count = _answer_all(model, prompts, max_new_tokens, reservoir, rotations, progress)
    record = {
        **provenance(model),
        "prompts": count,
        "answer_tokens": reservoir.seen,
        "samples": len(reservoir.queries),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    return _bank_of(reservoir, rotations, record)


def _answer_all(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    max_new_tokens: int,
    reservoir: _Reservoir,
    rotations: Mapping[int, Rotation],
    progress: Callable[[str], None],
) -> int:
    """Let the model answer the prompts, and sample the queries of the answers; how many prompts there were."""
    count = 0
    lease = Lease.of(model)
    try:
        for count, inputs in enumerate(prompts, 1):
            progress(f"prompt {count}")
            _answer(model, lease, inputs, count, max_new_tokens, reservoir, rotations)
    finally:
        # Not left to the cache: an error that is kept would keep it, and the model attached.
        lease.end()
    if not reservoir.queries:
        raise ConfigError(
            f"{count} prompt(s) gave no answer of more than one token, so no query of an answer: give others, or a "
            "larger max_new_tokens."
        )
    return count


def _answer(
    model: PreTrainedModel,
    lease: Lease,
    inputs: Mapping[str, Any],
    number: int,
    max_new_tokens: int,
    reservoir: _Reservoir,
    rotations: Mapping[int, Rotation],
) -> None:
    """Let the model answer one prompt, and sample the queries of the answer."""
    cache = PrunedCache(lease.attachment, PLPHPConfig(method="none"))
    cache.plan(inputs)
    _check_prompt(cache, number)
    generate: Any = model.generate
    with cache.listening(_Listener(cache, reservoir, rotations)):
        generate(
            **inputs,
            **passed(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
        )


def _bank_of(reservoir: _Reservoir, rotations: Mapping[int, Rotation], record: Mapping[str, Any]) -> QueryBank:
    kept = sorted(reservoir.queries)
    layers = {
        layer: LayerBank(torch.stack([reservoir.queries[number][layer] for number in kept], dim=1), rotation)
        for layer, rotation in rotations.items()
    }
    return QueryBank(layers, torch.tensor([reservoir.ahead[number] for number in kept]), record)


def _check_prompt(cache: PrunedCache, number: int) -> None:
    reading = cache.reading
    if reading is None:
        raise ConfigError(f"Prompt {number} has no vision token: collect from prompts like those that will be pruned.")
    if reading.batch != 1 or not reading.spans.valid.all():
        raise ConfigError(f"Prompt {number} has {reading.batch} rows or padding: give one prompt at a time, unpadded.")
