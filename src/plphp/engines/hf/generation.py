# SPDX-License-Identifier: Apache-2.0
"""What happens around ``model.generate`` while a model is attached."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from plphp.engines.hf.conversation.mrope import TurnPositions, position_holder
from plphp.engines.hf.conversation.turns import with_features
from plphp.errors import CacheStateError, UnsupportedFeatureError
from plphp.families.registry import family_of

from .cache_argument import NAME, NAMES, passed, take_cache
from .captured import DecodedCache
from .contexts import generating
from .graph import FEWEST_STEPS, graph_obstacle, refusal, replayed
from .unwrapping import refuse_adapters

SUPPORTED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class GeneratingCache(DecodedCache, Protocol):
    """What ``generate`` needs of a `plphp.engines.hf.cache.PrunedCache`, which stands above this module."""

    decode: str
    records: list[Any]

    @property
    def turn(self) -> TurnPositions | None: ...
    def get_seq_length(self) -> int: ...
    def plan_generate(self, inputs: Mapping[str, Any]) -> dict[str, Any]: ...
    def check_read(self) -> None: ...
    def note_answer(self, output: Any) -> None: ...
    def after_failure(self) -> None: ...
    def end_here(self, reason: str) -> None: ...


@dataclass(frozen=True)
class GenerateCall:
    """A call of ``generate`` that can be pruned rightly.

    Parameters
    ----------
    original : callable
        The model's own ``generate``.
    kwargs : dict
        All arguments by name, without a cache.
    config : GenerationConfig
        The settings that ``generate`` will use.
    cache_name : str
        Name under which a cache was passed; the one to use where there was none.
    cache : object or None
        The cache that was passed.
    """

    original: Callable[..., Any]
    kwargs: dict[str, Any]
    config: GenerationConfig
    cache_name: str
    cache: Any

    @classmethod
    def of(
        cls, model: PreTrainedModel, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> GenerateCall:
        """Name the arguments of a call and look at what it asks for.

        Raises
        ------
        UnsupportedFeatureError
            If it asks for something that cannot be pruned rightly.
        """
        kwargs = dict(kwargs)
        name, cache = take_cache(kwargs)
        if args:
            kwargs = {**inspect.signature(original).bind_partial(*args).arguments, **kwargs}
        config = _effective_config(model, kwargs)
        _refuse_unsupported(model, config, kwargs)
        return cls(original, kwargs, config, name, cache)


def generate(cache: GeneratingCache, call: GenerateCall) -> Any:
    """Run a call of ``generate`` with a `PrunedCache`.

    Raises
    ------
    SpanError
        If the vision tokens cannot be found.
    """
    model, config = cache.attachment.model, call.config
    inputs = _model_inputs(config, call.kwargs)
    length = cache.get_seq_length()
    kwargs = with_features(call.kwargs, cache.plan_generate(inputs), family_of(model.config))
    _refuse_to_share_images(cache, _expanded(config))
    if "attention_mask" in inputs:
        kwargs["attention_mask"] = inputs["attention_mask"]
    kwargs.update(passed(cache))
    kwargs.update(_positions(model, cache, config))
    try:
        with generating(), _replayed(model, cache, config, inputs):
            output = call.original(**kwargs)
        cache.check_read()
        _check_used(cache, length)
        cache.note_answer(output)
    except BaseException:
        cache.after_failure()
        raise
    finally:
        if (config.num_beams or 1) > 1 and cache.get_seq_length() != length:
            cache.end_here("it holds the beams that were running at the end, not the answer that was returned")
    return output


def _replayed(
    model: PreTrainedModel, cache: GeneratingCache, config: GenerationConfig, inputs: dict[str, Any]
) -> AbstractContextManager[None]:
    """Let decoding steps be replayed from a graph while the context is open, as the cache is to be decoded with."""
    reason = graph_obstacle(model, config.num_beams or 1)
    if cache.decode == "graph" and reason is not None:
        raise refusal(reason)
    steps = config.max_new_tokens
    if steps is None:
        prompt = inputs.get("input_ids", inputs.get("inputs_embeds"))
        # The default length of transformers counts new tokens alone.
        steps = 20 if config.max_length is None or prompt is None else max(0, config.max_length - prompt.shape[1])
    if cache.decode == "graph" or (cache.decode == "auto" and reason is None and steps >= FEWEST_STEPS):
        return replayed(model, cache, steps, required=cache.decode == "graph")
    return nullcontext()


def _expanded(config: GenerationConfig) -> bool:
    """Whether ``generate`` repeats the rows of its prompt."""
    return max(config.num_beams or 1, config.num_return_sequences or 1) > 1


def _refuse_to_share_images(cache: GeneratingCache, expanded: bool) -> None:
    """Raise where transformers would repeat new images by the placeholders of the whole chat, old ones included."""
    if expanded and cache.records and not cache.is_read:
        raise UnsupportedFeatureError(
            "Beams and several returned sequences do not take new images in a later turn of a chat that has images "
            "already: transformers would give them to the wrong rows. Decode this turn with num_beams=1 and "
            "num_return_sequences=1."
        )


def _check_used(cache: GeneratingCache, length: int) -> None:
    """Raise where ``generate`` came to its end with another cache than the one that it was given."""
    if cache.get_seq_length() == length or not cache.is_read:
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
        # transformers 5.17 cannot repeat positions; text alone is placed by the deltas, too.
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


def _effective_config(model: PreTrainedModel, kwargs: dict[str, Any]) -> GenerationConfig:
    """The settings that ``generate`` will use: arguments, then ``generation_config``, then the model's own."""
    given = kwargs.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise UnsupportedFeatureError(f"generation_config must be a GenerationConfig, got {type(given).__name__}.")
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    config.update(**{name: value for name, value in kwargs.items() if hasattr(config, name)})
    return config


def _refuse_unsupported(model: PreTrainedModel, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
    """Name what cannot be pruned rightly, with the reason and what to do."""
    if model.training:
        raise UnsupportedFeatureError(
            "The model is in training mode, where dropout changes the attention: call model.eval() first."
        )
    for name in NAMES:
        if hasattr(kwargs.get("generation_config"), name):
            raise UnsupportedFeatureError(
                f"The generation_config has an attribute {name!r}, which takes the place of the cache: remove it, and "
                f"pass a PrunedCache as {NAME}."
            )
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    if owner is not model and hasattr(owner, "peft_config"):  # a wrapper of PEFT puts its own there while it generates
        refuse_adapters(owner)
    if kwargs.get("custom_generate") is not None:
        raise UnsupportedFeatureError("plphp does not prune custom_generate functions: leave it out.")
    if config.use_cache is False:
        raise UnsupportedFeatureError(
            "use_cache=False leaves no KV cache to prune: leave it out, or call generate outside the session."
        )
    if config.cache_implementation not in (None, "hybrid"):  # transformers reads "hybrid" of old checkpoints as None
        raise UnsupportedFeatureError(
            f"cache_implementation={config.cache_implementation!r} asks for another cache than a PrunedCache: static, "
            "quantized, offloaded and paged caches cannot hold ragged entries. Leave it out."
        )
    if config.output_attentions:
        raise UnsupportedFeatureError(
            "output_attentions=True needs attention over the evicted entries: leave it out; run.report has the "
            "vision attention scores."
        )
    if config.penalty_alpha:
        raise UnsupportedFeatureError("Contrastive search re-reads pruned prompts: leave out penalty_alpha.")
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode not in SUPPORTED_MODES:
        raise UnsupportedFeatureError(
            f"plphp does not prune {mode.value.replace('_', ' ')}: use greedy search, sampling or beam search."
        )
