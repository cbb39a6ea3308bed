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
        if copy._modules.get(name) is not None:
            copy._modules[name] = copied_with(copy._modules[name], inner)
    return copy


class Scores(nn.Module):
    """Returns scores of patches [images, positions] in the place of their features."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores[..., None]

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return the scores as the features of any layer, with a single channel."""
        return BaseModelOutputWithPooling(
            last_hidden_state=self.scores,  # type: ignore[arg-type]  # transformers annotates a class of its own
            hidden_states=_OfAnyLayer((self.scores,)),
        )


class ScoresOfRow(Scores):
    """The same for a layer of a tower that holds all images in a row without a batch axis."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the scores [positions, 1]."""
        return self.scores[0]


class _OfAnyLayer(tuple[Tensor, ...]):
    """Hidden states that are the same at every layer."""

    def __getitem__(self, layer: Any) -> Any:
        return next(iter(self))


def scores_of_patches(scores: Tensor) -> Change:
    """Return what puts scores [images, positions] in the place of a tower, an encoder or a list of layers."""
    return lambda module: nn.ModuleList([ScoresOfRow(scores)]) if isinstance(module, nn.ModuleList) else Scores(scores)


class StandInModule(nn.Module):
    """Takes the place of a module: calls a function with it and its first input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], module: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.__dict__["module"] = module  # not among the submodules: its parameters are not this one's

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the function makes of the first input."""
        return self.function(self.__dict__["module"], args[0] if args else next(iter(kwargs.values())))


def average(module: Any, values: Tensor) -> Tensor:
    """Average over the windows of a convolution or a pooling layer; values [batch, channels, height, width]."""
    pooled = nn.functional.avg_pool2d(values, module.kernel_size, module.stride)
    return pooled.mean(1, keepdim=True).expand(-1, getattr(module, "out_channels", pooled.shape[1]), -1, -1)


def empty(module: Any, values: Tensor) -> Tensor:
    """A channel of zeros, float32, for each position of the values."""
    return torch.zeros(*values.shape[:-1], 1, dtype=torch.float32, device=values.device)
