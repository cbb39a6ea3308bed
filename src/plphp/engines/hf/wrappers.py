# SPDX-License-Identifier: Apache-2.0
"""The methods of a model that plphp stands in for while it is in use there: ``generate``, and continuous batching."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from plphp.errors import CacheStateError, UnsupportedFeatureError

from .contexts import OpenSessions

ATTRIBUTE = "_plphp_attachment"
"""Where a model holds its attachment while plphp is in use on it."""
NO_COPY = (
    "A model cannot be copied or pickled while plphp is in use on it: leave the session, call plphp.remove, or free "
    "the PrunedCache first. save_pretrained works at any time."
)


class AttachedModel(Protocol):
    """What a wrapper needs of a `plphp.engines.hf.attachment.Attachment`, which stands above this module."""

    sessions: OpenSessions


class MethodWrapper:
    """Stands in for a method of one model, as an attribute of the instance, which comes before the class's method.

    It holds the model weakly: a strong reference would be a cycle, which keeps weights in memory for a while after
    the model is deleted.
    """

    def __init__(self, model: PreTrainedModel, name: str, wrapper: Callable[..., Any]) -> None:
        method = getattr(model, name)
        functools.update_wrapper(self, method)
        del self.__wrapped__  # type: ignore[attr-defined]  # a bound method, which holds the model strongly
        self.__signature__ = inspect.signature(method)
        self.before = model.__dict__.get(name)
        self._model = weakref.ref(model)
        self._name = name
        self._wrapper = wrapper
        model.__dict__[name] = self

    @torch.compiler.disable  # what plphp does around generate; a compiled model stays compiled inside
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise CacheStateError(f"The model of this {self._name} was freed.")
        # Bound anew for each call: a bound method that is kept would hold the model strongly.
        original = self.before or getattr(type(model), self._name).__get__(model)
        attachment = model.__dict__.get(ATTRIBUTE)
        if attachment is None:  # somebody took model.generate inside a session, and calls it after its end
            return original(*args, **kwargs)
        return self._wrapper(attachment, original, *args, **kwargs)

    def __reduce__(self) -> Any:
        raise UnsupportedFeatureError(NO_COPY)

    def take_off(self, model: PreTrainedModel) -> None:
        """Give the model its own method back."""
        if self.before is None:
            del model.__dict__[self._name]
        else:
            model.__dict__[self._name] = self.before


def generate_with_plphp(attachment: AttachedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hand a call of ``generate`` to the `PrunedCache` among its arguments, else to the session, else to the model.

    Both are known by the ``run_generate`` of their class, as this module stands below them. A cache goes before the
    session: it was made for this very prompt, with settings of its own.
    """
    cache = next((value for value in kwargs.values() if hasattr(type(value), "run_generate")), None)
    session = attachment.sessions.here() if cache is None else attachment.sessions.here_or_none()
    if cache is not None:
        return cache.run_generate(attachment, session, original, args, kwargs)
    if session is not None:
        return session.run_generate(original, args, kwargs)
    return original(*args, **kwargs)


def refuse_batch(attachment: AttachedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Refuse continuous batching inside a session; outside of one the model does it unpruned."""
    if attachment.sessions.here() is None:
        return original(*args, **kwargs)
    raise UnsupportedFeatureError(
        "plphp does not prune continuous batching: its paged cache has one block table for all "
        "layers. Call generate, or leave the plphp session."
    )
