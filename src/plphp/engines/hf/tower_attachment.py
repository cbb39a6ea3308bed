# SPDX-License-Identifier: Apache-2.0
"""What a model carries while its vision tower is recorded: the name of the attention function and hooks on the tower.

Counted by those who listen: the first of them changes the model, and the last leaves it as it was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig, PreTrainedModel

from plphp.errors import UnsupportedFeatureError

from .attention import PREFIX
from .tower_attention import Listener, listeners, register_recorded


@dataclass
class _Attached:
    """What a model carries: how many listen, the names that its configs had, and the hooks on its tower."""

    listeners: int
    names: list[tuple[PretrainedConfig, str]]
    hooks: tuple[RemovableHandle, ...]


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
    token = listeners.set((*listeners.get(), listener))
    try:
        yield
    finally:
        listeners.reset(token)
        _detach(model)


def _attach(model: PreTrainedModel, tower: nn.Module) -> None:
    with _lock:
        known = _attached.get(model)
        if known is not None:
            known.listeners += 1
            return
        names = [(config, config._attn_implementation) for config in _configs(model, tower)]
        registered = [register_recorded(name) for _, name in names]
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


@torch.compiler.disable
def _begin(tower: nn.Module, args: Any) -> None:
    for listener in listeners.get():
        listener.begin(tower)


@torch.compiler.disable
def _end(tower: nn.Module, args: Any, output: Any) -> None:
    for listener in listeners.get():
        listener.end(tower)
