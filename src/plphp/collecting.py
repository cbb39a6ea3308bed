# SPDX-License-Identifier: Apache-2.0
"""The queries of a model's own answers, for the methods that foretell what an answer looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .answer_queries import AnswerQueries, LayerQueries
from .attachment import Lease
from .cache import PrunedCache
from .config import PLPHPConfig
from .errors import ConfigError
from .provenance import provenance
from .rotary import Rotation
from .rotary_probe import find_rotations


class _Moments:
    """Running first and second moments of queries, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, query: Tensor) -> None:
        """Add queries [q_heads, tokens, dim]."""
        query = query.double()
        self.count += query.shape[1]
        self.first = self.first + query.sum(1)
        self.second = self.second + query.mT @ query

    def of_layer(self, rotation: Rotation) -> LayerQueries:
        """Mean and covariance."""
        mean = torch.as_tensor(self.first) / self.count
        covariance = torch.as_tensor(self.second) / self.count - mean[..., :, None] * mean[..., None, :]
        return LayerQueries(mean.float(), covariance.float(), rotation)


class _Listener(PrunedCache):
    """Evicts nothing, and hears the queries of what is generated."""

    moments: Mapping[int, _Moments]
    rotations: Mapping[int, Rotation]

    def after_attention(self, layer_idx: int, query: Tensor, scaling: float) -> None:
        in_prompt = self._plan is not None
        super().after_attention(layer_idx, query, scaling)
        if in_prompt:
            return
        end = self._pruned[layer_idx].get_seq_length()
        position = torch.arange(end - query.shape[2], end, device=query.device)
        if self.turn is not None:
            position = position + self.turn.after[0].to(query.device)
        self.moments[layer_idx].add(self.rotations[layer_idx].turned(query[0], -position).cpu())


def collect_answer_queries(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    progress: Callable[[str], None] = lambda step: None,
) -> AnswerQueries:
    """Let a model answer prompts greedily, unpruned, and take the mean and covariance of its answers' queries.

    Take prompts like those that will be pruned, but others: a few dozen are enough for hundreds of query rows.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    prompts : iterable of mapping
        Inputs of ``generate`` with one row, without padding, and with at least one vision token.
    max_new_tokens : int
        Longest answer.
    progress : callable
        Told what is going on, in a few words.

    Returns
    -------
    AnswerQueries
        Save it for the option ``statistics`` of the method ``expected_attention``.

    Raises
    ------
    ConfigError
        If a prompt has several rows or no vision token, or all answers together have fewer than two tokens after
        their first.
    UnsupportedModelError
        If it is not known how the model turns its queries, see `plphp.rotary_probe.find_rotations`.

    Examples
    --------
    >>> plphp.collect_answer_queries(model, prompts).save("answers.safetensors")  # doctest: +SKIP
    """
    rotations = find_rotations(model)
    moments = {layer: _Moments() for layer in rotations}
    count = 0
    lease = Lease.of(model)
    try:
        for count, inputs in enumerate(prompts, 1):
            progress(f"prompt {count}")
            cache = _Listener(lease.attachment, PLPHPConfig(method="none"))
            cache.moments, cache.rotations = moments, rotations
            cache.plan(inputs)
            _check_prompt(cache, count)
            generate: Any = model.generate
            generate(
                **inputs,
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
            )
    finally:
        # Not left to the cache: an error that is kept would keep it, and the model attached.
        lease.end()
    rows = min((one.count for one in moments.values()), default=0)
    if rows < 2:
        raise ConfigError(
            f"{count} prompt(s) gave {rows} query rows of answers: give more prompts, or ones with longer answers."
        )
    record = {**provenance(model), "prompts": count, "query_rows": rows, "max_new_tokens": max_new_tokens}
    return AnswerQueries({layer: one.of_layer(rotations[layer]) for layer, one in moments.items()}, record)


def _check_prompt(cache: _Listener, number: int) -> None:
    plan = cache._plan
    if plan is None:
        raise ConfigError(f"Prompt {number} has no vision token: collect from prompts like those that will be pruned.")
    if plan.batch != 1 or not plan.spans.real.all():
        raise ConfigError(f"Prompt {number} has {plan.batch} rows or padding: give one prompt at a time, unpadded.")
