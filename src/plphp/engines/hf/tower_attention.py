# SPDX-License-Identifier: Apache-2.0
"""The attention function of a vision tower while it is recorded, and what a model carries for it.

The function attends as the model would without plphp and hands queries and keys to the listeners of this context,
beside that. It is registered for the life of the process; a model is given its name while somebody listens, counted by
`attach` and `detach`, and has its own name back afterwards.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from plphp.errors import UnsupportedFeatureError

from .attention import PREFIX, SUPPORTED_BASES, stock_attention
from .hiding import Attention


class Listener(Protocol):
    """Who is told what the vision towers of models do in a context."""

    def begin(self, tower: nn.Module) -> None:
        """Note that a tower starts to read images."""

    def end(self, tower: nn.Module) -> None:
        """Note that a tower has read them."""

    def attended(self, layer: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: Any) -> None:
        """Note queries and keys of an attention layer, with the options of its attention function."""


@dataclass
class _Attached:
    """What a model carries: how many listen, the names that its configs had, and the hooks on its tower."""

    listeners: int
    names: list[tuple[PretrainedConfig, str]]
    hooks: tuple[RemovableHandle, ...]


_listening: ContextVar[tuple[Listener, ...]] = ContextVar("plphp_tower_listeners", default=())
_attached: weakref.WeakKeyDictionary[PreTrainedModel, _Attached] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def listening(model: PreTrainedModel, tower: nn.Module, listener: Listener) -> Iterator[None]:
    """While open, tell the listener what the tower of a model does in this context.

    Raises
    ------
    UnsupportedFeatureError
        If the attention of the tower is not one of transformers' that are known, or shares its config.
    """
    _attach(model, tower)
    token = _listening.set((*_listening.get(), listener))
    try:
        yield
    finally:
        _listening.reset(token)
        _detach(model)


def _attach(model: PreTrainedModel, tower: nn.Module) -> None:
    with _lock:
        known = _attached.get(model)
        if known is not None:
            known.listeners += 1
            return
        names = [(config, config._attn_implementation) for config in _configs(model, tower)]
        registered = [_register(name) for _, name in names]
        for (config, _), name in zip(names, registered, strict=True):
            config._attn_implementation = name
        hooks = tower.register_forward_pre_hook(_begin), tower.register_forward_hook(_end)
        _attached[model] = _Attached(1, names, hooks)


def _detach(model: PreTrainedModel) -> None:
    with _lock:
        known = _attached[model]
        known.listeners -= 1
        if known.listeners:
            return
        for hook in known.hooks:
            hook.remove()
        for config, name in known.names:
            # A user who called set_attn_implementation meanwhile keeps what was asked for.
            if (config._attn_implementation or "").startswith(PREFIX):
                config._attn_implementation = name
        del _attached[model]


def _configs(model: PreTrainedModel, tower: nn.Module) -> list[PretrainedConfig]:
    """The distinct config objects that the layers of the tower and their masks read."""
    text = model.config.get_text_config(decoder=True)
    configs: list[PretrainedConfig] = []
    for module in tower.modules():
        config = getattr(module, "config", None)
        # By identity: configs are equal that are not the same object, and each has its own attention name.
        if isinstance(config, PretrainedConfig) and not any(config is known for known in configs):
            configs.append(config)
    if any(config is shared for config in configs for shared in (text, model.config)):
        raise UnsupportedFeatureError(f"The vision tower of {type(model).__name__} has no config of its own.")
    return configs


def _register(base: str) -> str:
    """Register the attention that stands in for ``base`` in a vision tower, and return its name."""
    if base.startswith(PREFIX):
        raise UnsupportedFeatureError(
            "The config object of this vision tower is also that of a tower that is being recorded: give each model a "
            "config of its own (copy.deepcopy)."
        )
    if base not in SUPPORTED_BASES:
        raise UnsupportedFeatureError(
            f"plphp records vision towers with the attention implementations {', '.join(SUPPORTED_BASES)}, and this "
            f"tower uses {base!r}: call model.set_attn_implementation('sdpa') first."
        )
    name = f"{PREFIX}tower_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _recorded(base))
        # Without a mask function of the same name, transformers silently drops the padding mask.
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _recorded(base: str) -> Attention:
    """Make the attention function that stands in for ``base``."""

    def plphp_tower_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        _tell(module, query, key, attention_mask, kwargs)
        return _stock(base, module)(module, query, key, value, attention_mask, **kwargs)

    plphp_tower_attention.__name__ = f"plphp_tower_over_{base}"
    return plphp_tower_attention


def _stock(base: str, module: nn.Module) -> Attention:
    """Return the attention function that the module would call without plphp."""
    # The file of Llama 4 has an eager attention for the text model and one for the tower.
    of_tower: Attention | None = getattr(sys.modules[type(module).__module__], "vision_eager_attention_forward", None)
    return of_tower if base == "eager" and of_tower is not None else stock_attention(base, module)


@torch.compiler.disable  # a compiled tower would go on with who listened when it was compiled
def _tell(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
    for listener in _listening.get():
        listener.attended(module, query, key, mask, options)


@torch.compiler.disable
def _begin(tower: nn.Module, args: Any) -> None:
    for listener in _listening.get():
        listener.begin(tower)


@torch.compiler.disable
def _end(tower: nn.Module, args: Any, output: Any) -> None:
    for listener in _listening.get():
        listener.end(tower)
