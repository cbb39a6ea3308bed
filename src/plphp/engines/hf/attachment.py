# SPDX-License-Identifier: Apache-2.0
"""What a model carries while plphp is in use, counted by leases: the attention name and the ``generate`` wrapper.

Nothing is patched at import and nothing is global. Sessions and caches hold a `Lease` each; the last lease to end
leaves the model as it was. References run one way: a lease holds its `Attachment`, an attachment knows its model
weakly, and the model holds the attachment while there are leases. So a model that its user drops is freed at once, and
a cache that is dropped without a word gives its lease back.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from plphp.errors import CacheStateError, UnsupportedFeatureError, UnsupportedModelError
from plphp.families.registry import family_of
from plphp.policy.rotation import Rotation

from .attention import PREFIX, register, unwatch, watch
from .contexts import OpenSessions, is_generating
from .packed_layers import PackedLayers
from .unwrapping import unwrapped
from .wrappers import ATTRIBUTE, NO_COPY, MethodWrapper, generate_with_plphp, refuse_batch

WRAPPED = ("generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Methods of a model that are stood in for."""

_lock = threading.RLock()  # of all models, and reentrant: a lease may be freed, and finalized, inside of it


class Attachment:
    """The changes to one model, made by the first lease and undone by the last.

    Attributes
    ----------
    sessions : OpenSessions
        The sessions that are open on the model.
    rotations : mapping of int to Rotation, or None
        Rotary position embeddings of the layers that can be pruned; None until `rotation_probe.rotations_of` has found
        them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._leases = 0
        self._originals: list[tuple[PretrainedConfig, str]] = []
        self._packed_layers: PackedLayers | None = None
        self.sessions = OpenSessions()
        self.rotations: Mapping[int, Rotation] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model that is changed.

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
        raise UnsupportedFeatureError(NO_COPY)

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

    def pack_layers(self) -> None:
        """From now on decoder layers get what a cache says that they get, for methods that act before the KV cache.

        Raises
        ------
        UnsupportedModelError
            If the decoder layers of the model are not found.
        """
        with _lock:
            if self._packed_layers is None:
                model = self.model
                layers = model.config.get_text_config(decoder=True).num_hidden_layers
                self._packed_layers = PackedLayers(model.get_decoder(), layers)

    def note_unpruned(self) -> None:
        """Note a pass over the layers without a `PrunedCache`, while a session is open.

        Inside a ``generate`` that plphp runs they are not counted: at its end it checks by itself that its cache was
        used, and raises.
        """
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
                    MethodWrapper(model, name, generate_with_plphp if name == "generate" else refuse_batch)
        except BaseException:
            self._detach()
            raise

    def _detach(self) -> None:
        model = self._model()
        for config, name in self._originals:
            # A user who called set_attn_implementation meanwhile keeps what was asked for.
            if (config._attn_implementation or "").startswith(PREFIX):
                config._attn_implementation = name
        self._originals = []
        if self._packed_layers is not None:
            self._packed_layers.remove()
            self._packed_layers = None
        if model is not None:
            unwatch(_first_prunable(model))
            for name in WRAPPED:
                wrapper = model.__dict__.get(name)
                if isinstance(wrapper, MethodWrapper):  # else somebody put another method on top of it
                    wrapper.take_off(model)
            model.__dict__.pop(ATTRIBUTE, None)


class Lease:
    """Keeps a model attached as long as it lives, or until `end`."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        attachment.retain()
        # Runs once, at `end` or when the lease is freed, whichever comes first.
        self._finalizer = weakref.finalize(self, attachment.release)

    @classmethod
    def of(cls, model: Any) -> Lease:
        """Attach a model, or the model inside of a wrapper (`plphp.engines.hf.unwrapping`); join what is attached.

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
    configs = [text_config]
    for module in decoder.modules():
        config = getattr(module, "config", None)
        # By identity: configs are equal that are not the same object, and each has its own attention name.
        if isinstance(config, PretrainedConfig) and not any(config is known for known in configs):
            configs.append(config)
    return configs


def _first_prunable(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of the first layer that can be pruned, by which every pass over the text model comes."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    first = next((number for number, layer in enumerate(layers) if type(layer) is DynamicLayer), -1)
    return [module for module in model.get_decoder().modules() if getattr(module, "layer_idx", None) == first]
