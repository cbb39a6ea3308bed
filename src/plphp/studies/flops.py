# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of matrix products, counted in passes over shapes alone.

A multiplication and an addition are two. What is no matrix product (norms, softmax, rotary embeddings) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from plphp.engines.hf.patch_ways import feature_arguments
from plphp.engines.hf.tower_layers import core_of
from plphp.errors import UnsupportedModelError
from plphp.families.registry import family_of

BATCHED = "aten.bmm"
"""The products of attention, of experts, and of recurrent states."""


@dataclass
class PassFlops:
    """What the decoder layers of a model compute in a pass over a single token.

    Attributes
    ----------
    weights : list of int
        By layer, the products with weights: those of the experts that the token goes to, and of short convolutions.
    attention : list of int
        By layer, the batched products that are not of experts: in an attention layer those of a query with a key and
        a value.
    """

    weights: list[int] = field(default_factory=list)
    attention: list[int] = field(default_factory=list)


@contextmanager
def counted_layers(model: PreTrainedModel, layers: int) -> Iterator[PassFlops]:
    """Count what the decoder layers compute while open, for a pass of the whole model over a single token.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    layers : int
        Its decoder layers.

    Raises
    ------
    UnsupportedModelError
        If they are not found.
    """
    counts = PassFlops()
    with FlopCounterMode(display=False) as counter:
        yield counts
    by_module = {
        name: {str(operation): flops for operation, flops in operations.items()}
        for name, operations in counter.get_flop_counts().items()
    }
    for name in _layer_names(model, layers):
        of_layer = by_module.get(name, {})
        batched = of_layer.get(BATCHED, 0)
        experts = sum(
            operations.get(BATCHED, 0)
            for inner, operations in by_module.items()
            if inner.startswith(f"{name}.") and inner.endswith(".experts")
        )
        counts.weights.append(sum(of_layer.values()) - batched + experts)
        counts.attention.append(batched - experts)


def _layer_names(model: PreTrainedModel, layers: int) -> list[str]:
    """The decoder layers as the counter names them."""
    decoder = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        inner = getattr(module, "layers", None)
        if id(module) in decoder and isinstance(inner, nn.ModuleList) and len(inner) == layers:
            path = ".".join(part for part in (type(model).__name__, name, "layers") if part)
            return [f"{path}.{number}" for number in range(layers)]
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {layers} decoder layers, so what they compute cannot be counted."
    )


def tower_flops(model: PreTrainedModel, inputs: Mapping[str, Any]) -> int | None:
    """Count what the images and videos of a prompt take before the text model: the vision tower and what follows it.

    Parameters
    ----------
    model : PreTrainedModel
        A model as `plphp.inputs.loading.empty_model` makes it, which must not be used afterwards: it is given buffers.
    inputs : mapping
        The prompt as the processor returns it; sizes alone count.

    Returns
    -------
    int or None
        None where the pass needs more than shapes, as Gemma 4's does, which looks at which patches are padding.
    """
    core = core_of(model)
    model.requires_grad_(False)
    for module in core.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _ShapesOfWeights():
        for features in family_of(model.config).features:
            pixels = inputs.get(features.pixels[0])
            if pixels is None:
                continue
            method: Any = core.get_video_features if features.of_videos else core.get_image_features
            try:
                method(pixels, **feature_arguments(method, core.config, inputs))
            except (RuntimeError, NotImplementedError, TypeError, ValueError):
                return None
    return int(counter.get_total_flops())


class _ShapesOfWeights(TorchDispatchMode):
    """While open, all that is worked out with a meta tensor is one, and everything else stays on the CPU.

    So a model without weights takes sizes and grids, whose values decide what is computed, as they are.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        empty = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs)))
        if empty:
            args, kwargs = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta" if empty else "cpu")
        return func(*args, **kwargs)
