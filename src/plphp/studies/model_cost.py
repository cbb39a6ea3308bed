# SPDX-License-Identifier: Apache-2.0
"""What a model's weights and KV cache take, in bytes, from its class and configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.layer import layer_nbytes
from plphp.errors import UnsupportedModelError
from plphp.io.quoting import one_line
from plphp.policy.allocation import kept_count


@dataclass(frozen=True)
class LayerCost:
    """What one layer's cache takes for one sequence.

    Parameters
    ----------
    entry_bytes : int
        Keys and values of one token, over all KV heads.
    window : int, optional
        Most tokens that are held; None where all are.
    state_bytes : int
        What does not grow with the tokens (linear attention).
    prunable : bool
        Whether vision tokens are evicted from it.
    """

    entry_bytes: int
    window: int | None
    state_bytes: int
    prunable: bool


@dataclass(frozen=True)
class ModelCost:
    """What a model takes in memory and reads per decoding step.

    Parameters
    ----------
    weight_bytes : int
        All weights, the vision tower included.
    step_weight_bytes : int
        Weights that a decoding step reads: the text model and the output embeddings. Of a mixture of experts all of
        them, as a batch of many tokens reads them.
    experts : bool
        Whether it is a mixture of experts, where a small batch reads less.
    layers : tuple of LayerCost
        The text model's.
    """

    weight_bytes: int
    step_weight_bytes: int
    experts: bool
    layers: tuple[LayerCost, ...]

    def kv_bytes(self, tokens: int, vision_tokens: int = 0, retention: float = 1.0) -> int:
        """Bytes of the KV cache of one sequence, without room that a cache reserves for more tokens.

        Parameters
        ----------
        tokens : int
            Length of the sequence, evicted tokens included.
        vision_tokens : int
            How many of them are vision tokens.
        retention : float
            Fraction of the vision tokens that every layer and KV head keeps.
        """
        evicted = vision_tokens - kept_count(retention, vision_tokens, min_kept=1)
        total = 0
        for layer in self.layers:
            held = tokens if layer.window is None else min(tokens, layer.window)
            total += layer.state_bytes + layer.entry_bytes * (held - evicted if layer.prunable else held)
        return total


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Work out what a model takes; a pass over one token tells the shapes.

    Parameters
    ----------
    model : PreTrainedModel
        As `plphp.inputs.loading.empty_model` makes it, and of no other use afterwards.

    Raises
    ------
    UnsupportedModelError
        If the pass fails, or the checkpoint is quantized.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "The checkpoint is quantized, and its configuration does not tell the bytes of its weights: name the model "
            "that it was made from."
        )
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    # The others look at values, or at dtypes, that the meta device has not got.
    model.set_experts_implementation("batched_mm")
    try:
        with torch.no_grad():
            model(input_ids=token, **passed(cache), use_cache=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"The cache of {type(model).__name__} cannot be told from its configuration: {one_line(error)}"
        ) from error
    return ModelCost(
        weight_bytes=_nbytes(model.parameters()),
        step_weight_bytes=_step_weights(model),
        experts=any("experts" in name for name, _ in model.named_modules()),
        layers=tuple(_layer_cost(layer) for layer in cache.layers),
    )


def _layer_cost(layer: Any) -> LayerCost:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return LayerCost(0, None, layer_nbytes(layer), prunable=False)
    return LayerCost(
        entry_bytes=keys[:, :, 0].nbytes + values[:, :, 0].nbytes,
        window=getattr(layer, "sliding_window", None),
        state_bytes=0,
        prunable=type(layer) is DynamicLayer,
    )


def _step_weights(model: PreTrainedModel) -> int:
    """The text model reads one row of its input embeddings, unless they are the output embeddings, too."""
    text = {id(weight): weight for weight in model.get_decoder().parameters()}
    for weight in model.get_input_embeddings().parameters():
        text.pop(id(weight), None)
    for weight in model.get_output_embeddings().parameters():
        text[id(weight)] = weight
    return _nbytes(text.values())


def _nbytes(weights: Any) -> int:
    return sum(weight.nbytes for weight in weights)
