# SPDX-License-Identifier: Apache-2.0
"""What takes the place of modules between patches and tokens, so that scores go the way of the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .copies import Change, standing_in

Function = Callable[[Any, Tensor], Tensor]
"""From a module and its first input to what it shall return."""


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
