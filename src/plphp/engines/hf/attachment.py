# SPDX-License-Identifier: Apache-2.0
"""What a model carries while plphp is in use, counted by leases: the attention name and the ``generate`` wrapper.

Nothing is patched at import and nothing is global. The last lease to end leaves the model as it was.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from plphp.errors import CacheStateError, UnsupportedFeatureError, UnsupportedModelError
from plphp.families.registry import family_of

from .attention import PREFIX, register, unwatch, watch
from .contexts import OpenSessions, is_generating
from .unwrapping import unwrapped

ATTRIBUTE = "_plphp_attachment"
_NO_COPY = (
    "A model cannot be copied or pickled while plphp is in use on it: leave the session, call plphp.remove, or free "
    "the PrunedCache first. save_pretrained works at any time."
)
WRAPPED = ("generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of a model that are stood in for."""

_lock = threading.RLock()


class Attachment:
    """The changes to one model.

    Attributes
    ----------
    sessions : OpenSessions
        Those that are open on the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._leases = 0
        self._originals: list[tuple[PretrainedConfig, str]] = []
        self.sessions = OpenSessions()

    @property
    def model(self) -> PreTrainedModel:
        """The model.

        Raises
        ------
        CacheStateError
            If it was freed.
        """
        model = self._model()
        if model is None:
            raise CacheStateError("The model of this PrunedCache was freed.")
        return model

    @property
    def active(self) -> bool:
        """Whether the model carries the changes now."""
        return self._leases > 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        # A copied cache belongs to the same model.
        return self

    def __reduce__(self) -> Any:
        raise UnsupportedFeatureError(_NO_COPY)

    def retain(self) -> None:
        """Count one more lease; the first one changes the model."""
        with _lock:
            if self._leases == 0:
                self._attach()
            self._leases += 1

    def release(self) -> None:
        """Count one lease less; the last one restores the model."""
        with _lock:
            self._leases -= 1
            if self._leases == 0:
                self._detach()

    def reads(self, module: nn.Module) -> bool:
        """Whether a layer's attention is one of the model's."""
        return any(module.config is config for config, _ in self._originals)

    def note_unpruned(self) -> None:
        """Note a pass over the layers without a `PrunedCache`, while a session is open."""
        session = None if is_generating() else self.sessions.here_or_none()
        if session is not None:
            session.note_unpruned()

    def _attach(self) -> None:
        model = self.model
        names = [(config, register(config._attn_implementation)) for config in _text_configs(model)]
        self._originals = [(config, config._attn_implementation) for config, _ in names]
        try:
            for config, name in names:
                config._attn_implementation = name
            watch(_first_prunable(model), self.note_unpruned)
            model.__dict__[ATTRIBUTE] = self
            for name in WRAPPED:
                if hasattr(model, name):
                    _Wrapper(model, name, _generate if name == "generate" else _refuse_batch)
        except BaseException:
            self._detach()
            raise

    def _detach(self) -> None:
        model = self._model()
        for config, name in self._originals:
            if (config._attn_implementation or "").startswith(PREFIX):
                config._attn_implementation = name
        self._originals = []
        if model is not None:
            unwatch(_first_prunable(model))
            for name in WRAPPED:
                wrapper = model.__dict__.get(name)
                if isinstance(wrapper, _Wrapper):
                    wrapper.take_off(model)
            model.__dict__.pop(ATTRIBUTE, None)


class Lease:
    """Keeps a model attached as long as it lives, or until `end`."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        attachment.retain()
        self._finalizer = weakref.finalize(self, attachment.release)

    @classmethod
    def of(cls, model: Any) -> Lease:
        """Attach a model, or the one inside of a wrapper (see `plphp.engines.hf.unwrapping`), or join those that have.

        Raises
        ------
        UnsupportedModelError
            If it is not a model that plphp can prune.
        UnsupportedFeatureError
            If its attention implementation or the wrapper is not supported.
        """
        model = unwrapped(model)
        family_of(model.config)
        with _lock:
            return cls(model.__dict__.get(ATTRIBUTE) or Attachment(model))

    def end(self) -> None:
        """Release now."""
        self._finalizer()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return Lease(self.attachment)


def _text_configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The distinct config objects that the text layers and their masks read."""
    decoder = model.get_decoder()
    text_config = model.config.get_text_config(decoder=True)
    if decoder is None or decoder is model or text_config is model.config:
        raise UnsupportedModelError(f"{type(model).__name__} has no text model with a config of its own.")
    found = [text_config]
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and not any(config is other for other in found):
            found.append(config)
    return found


def _first_prunable(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of the first layer that can be pruned, by which every pass over the text model comes."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    first = next((number for number, layer in enumerate(layers) if type(layer) is DynamicLayer), -1)
    return [module for module in model.get_decoder().modules() if getattr(module, "layer_idx", None) == first]


class _Wrapper:
    """Stands in for a method of one model, as an attribute of the instance.

    It holds the model weakly: a strong reference would be a cycle, which keeps weights in memory for a while after
    the model is deleted.
    """

    def __init__(self, model: PreTrainedModel, name: str, wrapper: Callable[..., Any]) -> None:
        method = getattr(model, name)
        functools.update_wrapper(self, method)
        del self.__wrapped__  # type: ignore[attr-defined]
        self.__signature__ = inspect.signature(method)
        self.before = model.__dict__.get(name)
        self._model = weakref.ref(model)
        self._name = name
        self._wrapper = wrapper
        model.__dict__[name] = self

    @torch.compiler.disable  # of its own; a compiled model stays compiled inside
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise CacheStateError(f"The model of this {self._name} was freed.")
        original = self.before or getattr(type(model), self._name).__get__(model)
        attachment = model.__dict__.get(ATTRIBUTE)
        if attachment is None:  # taken from the model inside a session that is over
            return original(*args, **kwargs)
        return self._wrapper(attachment, original, *args, **kwargs)

    def __reduce__(self) -> Any:
        raise UnsupportedFeatureError(_NO_COPY)

    def take_off(self, model: PreTrainedModel) -> None:
        """Give the model its own method back."""
        if self.before is None:
            del model.__dict__[self._name]
        else:
            model.__dict__[self._name] = self.before


def _generate(attachment: Attachment, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Hand a call of ``generate`` to the `PrunedCache` among its arguments, else to the session, else to the model.

    Both are known by their method ``run_generate``: this module stands below them.
    """
    cache = next((value for value in kwargs.values() if hasattr(value, "run_generate")), None)
    session = attachment.sessions.here() if cache is None else attachment.sessions.here_or_none()
    if cache is not None:
        return cache.run_generate(attachment, session, original, args, kwargs)
    if session is not None:
        return session.run_generate(original, args, kwargs)
    return original(*args, **kwargs)


def _refuse_batch(attachment: Attachment, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if attachment.sessions.here() is None:
        return original(*args, **kwargs)
    raise UnsupportedFeatureError(
        "plphp does not prune continuous batching: its paged cache has one block table for all "
        "layers. Call generate, or leave the plphp session."
    )
