# SPDX-License-Identifier: Apache-2.0
"""A copy of a module in which some of its parts are stood in for, so that scores go the way of the features.

The copy shares everything with the module but what is stood in for, and the module itself is never changed: another
thread may run it meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

OWN = ("_parameters", "_buffers", "_modules")
"""Tables of a module of which its copy has its own."""
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
INSTANCE_FORWARD = ("forward", "_old_forward", "_hf_hook")
"""What accelerate puts on a module to move its inputs, bound to the module and not to a copy."""

Function = Callable[[Any, Tensor], Tensor]
"""From a module and its first input to what it shall return."""
Change = Callable[[Any], Any]
"""From what stands at a path to what takes its place."""


def copied_with(module: nn.Module, changes: Mapping[str, Change]) -> Any:
    """Copy a module, with other things in the place of some of its submodules, parameters and buffers.

    Parameters
    ----------
    module : nn.Module
    changes : mapping
        By path from the module; a path that leads nowhere is left out.
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update({name: dict(module.__dict__[name]) for name in OWN})
    copy.__dict__.update({name: OrderedDict() for name in HOOKS})
    for name in INSTANCE_FORWARD:
        copy.__dict__.pop(name, None)
    below: dict[str, dict[str, Change]] = {}
    for path, change in changes.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = change
            continue
        for table in (copy.__dict__[name] for name in OWN):
            if table.get(first) is not None:
                table[first] = change(table[first])
    for name, inner in below.items():
        part = copy._modules.get(name)
        if part is not None:
            copy._modules[name] = copied_with(part, inner)
    return copy


def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Any:
    """Copy a module that runs another forward; the model may still read its sizes and its dtype."""
    copy = copied_with(module, {})
    copy.__dict__["forward"] = forward
    return copy


def scores_of_patches(scores: Tensor) -> Change:
    """Return what puts scores [images, positions] in the place of the features that a module returns.

    A list of layers, as of a tower that holds all images in a row without a batch axis, is given a single layer that
    returns the scores [positions, 1]. A tower or an encoder returns them [images, positions, 1] as the features of any
    of its layers.
    """
    features = scores[..., None]

    def outputs(*args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        hidden_states: Any = _OfAnyLayer((features,))
        last: Any = features
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=hidden_states)

    def change(module: nn.Module) -> Any:
        if isinstance(module, nn.ModuleList):
            return nn.ModuleList([standing_in(module[-1], lambda *args, **kwargs: features[0])])
        return standing_in(module, outputs)

    return change


class _OfAnyLayer(tuple[Tensor, ...]):
    """Hidden states that are the same at every layer."""

    def __getitem__(self, layer: Any) -> Any:
        return next(iter(self))


def computing(function: Function) -> Change:
    """Return what puts a function of a module and its first input in the place of the module."""

    def change(module: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            return function(module, args[0] if args else next(iter(kwargs.values())))

        return standing_in(module, forward)

    return change


def average(module: Any, values: Tensor) -> Tensor:
    """Average over the windows of a convolution or a pooling layer; values [batch, channels, height, width]."""
    pooled = nn.functional.avg_pool2d(values, module.kernel_size, module.stride)
    return pooled.mean(1, keepdim=True).expand(-1, getattr(module, "out_channels", pooled.shape[1]), -1, -1)


def empty(module: Any, values: Tensor) -> Tensor:
    """A channel of zeros, float32, for each position of the values."""
    return torch.zeros(*values.shape[:-1], 1, dtype=torch.float32, device=values.device)
