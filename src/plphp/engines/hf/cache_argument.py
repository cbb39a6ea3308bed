# SPDX-License-Identifier: Apache-2.0
"""The name under which transformers takes a cache: ``past_key_values``, and from 5.24 on ``cache``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache

from plphp.errors import ConfigError

NAMES = ("cache", "past_key_values", "cache_params")
"""All names that transformers 5 knows; an older name warns at every call in newer versions."""
NAME = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else NAMES[1]
"""The name in the version that is installed."""


def passed(cache: Cache | None) -> dict[str, Any]:
    """The keyword argument that hands a cache to a model or to its ``generate``."""
    return {NAME: cache}


def cache_in(output: Any) -> Any:
    """The cache that the output of a model, or of its ``generate``, carries."""
    return getattr(output, NAME)


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model, under any of its names; None where no cache is passed."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def take_cache(arguments: MutableMapping[str, Any]) -> tuple[str, Any]:
    """Remove the cache from arguments of ``generate``.

    Parameters
    ----------
    arguments : dict
        As the user passed them. A cache under a name that is not in `NAMES` is taken, too: transformers would ignore
        it, or pass it on to the model.

    Returns
    -------
    name : str
        The name that it had; `NAME` where there is no cache.
    cache : object or None
        The cache that was passed.

    Raises
    ------
    ConfigError
        If there are several.
    """
    caches = {
        name: value
        for name, value in arguments.items()
        if value is not None and (name in NAMES or isinstance(value, Cache))
    }
    if len({id(value) for value in caches.values()}) > 1:
        raise ConfigError(f"generate takes one cache, got several: {', '.join(caches)}. Pass one of them, as {NAME}.")
    for name in (*NAMES, *caches):
        arguments.pop(name, None)
    return next(iter(caches.items()), (NAME, None))
