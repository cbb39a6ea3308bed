# SPDX-License-Identifier: Apache-2.0
"""What a call of ``generate`` asks for, by the names of its arguments; what cannot be pruned rightly is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from plphp.errors import UnsupportedFeatureError

from .cache_argument import NAME, NAMES, take_cache
from .unwrapping import refuse_adapters

SUPPORTED_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


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
        Name under which a cache was passed; `NAME` where there was none.
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


def _effective_config(model: PreTrainedModel, kwargs: dict[str, Any]) -> GenerationConfig:
    """The settings that ``generate`` will use: arguments, then ``generation_config``, then the model's own."""
    argument = kwargs.get("generation_config")
    if argument is not None and not isinstance(argument, GenerationConfig):
        raise UnsupportedFeatureError(f"generation_config must be a GenerationConfig, got {type(argument).__name__}.")
    config = GenerationConfig() if argument is None else copy.deepcopy(argument)
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
    # While a wrapper of PEFT generates, it puts its own prepare_inputs_for_generation on the model: the only trace of
    # its adapters where the session was opened on the model inside of it.
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    if owner is not model and hasattr(owner, "peft_config"):
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
