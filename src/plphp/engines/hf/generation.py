# SPDX-License-Identifier: Apache-2.0
"""A call of ``generate`` with a `PrunedCache`: the prompt is planned, the model generates, the cache is checked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from plphp.engines.hf.conversation.mrope import TurnPositions, position_holder
from plphp.engines.hf.conversation.turns import with_features
from plphp.errors import CacheStateError, UnsupportedFeatureError
from plphp.families.registry import family_of

from .cache_argument import NAME, passed
from .captured import DecodedCache
from .contexts import generating
from .dispatch import replayed
from .generate_call import GenerateCall
from .graph import FEWEST_STEPS, graph_obstacle, refusal


class GeneratingCache(DecodedCache, Protocol):
    """What ``generate`` needs of a `plphp.engines.hf.cache.PrunedCache`, which stands above this module."""

    decode: str
    looking: bool
    records: list[Any]

    @property
    def turn(self) -> TurnPositions | None: ...
    def get_seq_length(self) -> int: ...
    def tower_recorded(self) -> AbstractContextManager[None]: ...
    def plan_generate(self, inputs: Mapping[str, Any]) -> dict[str, Any]: ...
    def check_read(self) -> None: ...
    def note_answer(self, output: Any) -> None: ...
    def after_failure(self) -> None: ...
    def end_here(self, reason: str) -> None: ...


def generate(cache: GeneratingCache, call: GenerateCall) -> Any:
    """Run a call of ``generate`` with a `PrunedCache`.

    Raises
    ------
    SpanError
        If the vision tokens cannot be found.
    """
    model, config = cache.attachment.model, call.config
    inputs = _model_inputs(config, call.kwargs)
    length_before = cache.get_seq_length()
    kwargs = with_features(call.kwargs, cache.plan_generate(inputs), family_of(model.config))
    _refuse_to_share_images(cache, _expanded(config))
    if "attention_mask" in inputs:
        kwargs["attention_mask"] = inputs["attention_mask"]
    kwargs.update(passed(cache))
    kwargs.update(_positions(model, cache, config))
    try:
        with generating(), _replayed(model, cache, config, inputs), cache.tower_recorded():
            output = call.original(**kwargs)
        cache.check_read()
        _check_used(cache, length_before)
        cache.note_answer(output)
    except BaseException:
        cache.after_failure()
        raise
    finally:
        if (config.num_beams or 1) > 1 and cache.get_seq_length() != length_before:
            cache.end_here("it holds the beams that were running at the end, not the answer that was returned")
    return output


def _replayed(
    model: PreTrainedModel, cache: GeneratingCache, config: GenerationConfig, inputs: dict[str, Any]
) -> AbstractContextManager[None]:
    """While open, decoding steps are replayed from a CUDA graph, where the cache's ``decode`` asks for it."""
    reason = graph_obstacle(model, config.num_beams or 1)
    if cache.decode == "graph" and reason is not None:
        raise refusal(reason)
    steps = config.max_new_tokens
    if steps is None:
        prompt = inputs.get("input_ids", inputs.get("inputs_embeds"))
        # The default length of transformers counts new tokens alone.
        steps = 20 if config.max_length is None or prompt is None else max(0, config.max_length - prompt.shape[1])
    if cache.decode == "graph" or (cache.decode == "auto" and reason is None and steps >= FEWEST_STEPS):
        cache.looking = False  # what is replayed is seen by nobody
        return replayed(model, cache, steps, required=cache.decode == "graph")
    return nullcontext()


def _expanded(config: GenerationConfig) -> bool:
    """Whether ``generate`` repeats the rows of its prompt, for beams or for several returned sequences."""
    return max(config.num_beams or 1, config.num_return_sequences or 1) > 1


def _refuse_to_share_images(cache: GeneratingCache, expanded: bool) -> None:
    """Raise where transformers would repeat new images by the placeholders of the whole chat, old ones included."""
    if expanded and cache.records and not cache.is_read:
        raise UnsupportedFeatureError(
            "Beams and several returned sequences do not take new images in a later turn of a chat that has images "
            "already: transformers would give them to the wrong rows. Decode this turn with num_beams=1 and "
            "num_return_sequences=1."
        )


def _check_used(cache: GeneratingCache, length_before: int) -> None:
    """Raise where ``generate`` came to its end with another cache than the `PrunedCache` that was passed to it.

    A custom ``generate`` that drops its keyword arguments makes a cache of its own: the answer is right, and unpruned.
    """
    if cache.get_seq_length() == length_before or not cache.is_read:
        raise CacheStateError(
            f"generate ran without the cache that plphp gave it as {NAME}, so with its whole cache: does this model's "
            "generate, or one that was put in its place, pass on its keyword arguments?"
        )


def _positions(model: PreTrainedModel, cache: GeneratingCache, config: GenerationConfig) -> dict[str, Any]:
    """Positions of a later turn of a model with m-RoPE."""
    turn = cache.turn
    if turn is None or turn.before is None:
        return {}
    if _expanded(config) and torch.equal(turn.before, turn.after):
        # transformers 5.17 cannot repeat positions for beams; text alone is placed right by the deltas, too. They are
        # put back on the model, where the prompt of another conversation may have overwritten them.
        position_holder(model).rope_deltas = turn.before
        return {}
    return {"position_ids": turn.positions}


def _model_inputs(config: GenerationConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The prompt under the names that the model uses, with the padding mask that ``generate`` would infer."""
    inputs = {name: value for name, value in kwargs.items() if value is not None}
    if "inputs" in inputs:
        inputs["input_ids"] = inputs.pop("inputs")
    ids = inputs.get("input_ids")
    if inputs.get("attention_mask") is None and isinstance(ids, Tensor) and ids.ndim == 2:
        pad, eos = config.pad_token_id, config.eos_token_id
        stops = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        if isinstance(pad, int) and pad not in stops:
            inputs["attention_mask"] = (ids != pad).long()
    return inputs
