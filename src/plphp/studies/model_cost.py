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

from .tier_cost import TierCost, book_nbytes


@dataclass(frozen=True)
class LayerCost:
    """What a layer's cache takes for a sequence.

    Parameters
    ----------
    entry_bytes : int
        Bytes of the keys and values of a token, over all KV heads.
    window : int, optional
        Most tokens that the layer holds; None where it holds all.
    state_bytes : int
        Bytes of a state that does not grow with the tokens (linear attention).
    prunable : bool
        Whether vision tokens are evicted from the layer.
    kv_heads : int
        KV heads; 0 where the layer holds a state alone.
    dims : tuple of int
        Channels of their keys and values.
    """

    entry_bytes: int
    window: int | None
    state_bytes: int
    prunable: bool
    kv_heads: int = 0
    dims: tuple[int, int] = (0, 0)

    def nbytes(self, tokens: int) -> int:
        """Bytes that it holds of so many tokens, all of them whole."""
        return self.state_bytes + self.entry_bytes * (tokens if self.window is None else min(tokens, self.window))


@dataclass(frozen=True)
class ModelCost:
    """What a model takes in memory and reads per decoding step.

    Parameters
    ----------
    weight_bytes : int
        Bytes of all weights, the vision tower included.
    step_weight_bytes : int
        Bytes of the weights that a decoding step reads: the text model and the output embeddings. All experts of a
        mixture count, as a batch of many tokens reads them all.
    experts : bool
        Whether the model is a mixture of experts, where a small batch reads less.
    layers : tuple of LayerCost
        The layers of the text model.
    """

    weight_bytes: int
    step_weight_bytes: int
    experts: bool
    layers: tuple[LayerCost, ...]

    def kv_bytes(
        self, tokens: int, vision_tokens: int = 0, retention: float = 1.0, tiers: TierCost | None = None
    ) -> int:
        """Bytes of the KV cache of a sequence, without room that a cache reserves for more tokens.

        Parameters
        ----------
        tokens : int
            Length of the sequence, evicted tokens included.
        vision_tokens : int
            Vision tokens among them.
        retention : float
            Fraction of the vision tokens that every layer and KV head keeps.
        tiers : TierCost, optional
            What holds them in the place of that.

        Raises
        ------
        UnsupportedFeatureError
            If a rung cannot hold keys and values of such widths.
        """
        if tiers is not None:
            return round(self._in_tiers(tokens, vision_tokens, tiers)[0])
        evicted = vision_tokens - kept_count(retention, vision_tokens, min_kept=1)
        return sum(layer.nbytes(tokens) - layer.entry_bytes * evicted * layer.prunable for layer in self.layers)

    def read_bytes(self, tokens: int, vision_tokens: int, tiers: TierCost) -> int:
        """Bytes that a decoding step reads at most of what `kv_bytes` counts."""
        return round(self._in_tiers(tokens, vision_tokens, tiers)[1])

    def book_bytes(self, tiers: TierCost) -> int:
        """Bytes of the codebooks that tiers need, for all sequences together."""
        if not tiers.needs_books:
            return 0
        return sum(book_nbytes(layer.kv_heads, layer.dims) for layer in self.layers if layer.prunable)

    def _in_tiers(self, tokens: int, vision_tokens: int, tiers: TierCost) -> tuple[float, float]:
        """Bytes that are held for a sequence, and those that a decoding step reads at most."""
        held = read = 0.0
        for layer in self.layers:
            if layer.prunable:
                tiers.check(layer.dims)
                of_head = tiers.head_bytes(vision_tokens, layer.dims, layer.entry_bytes // layer.kv_heads)
                whole = layer.state_bytes + layer.entry_bytes * (tokens - vision_tokens)
                held, read = (
                    total + whole + layer.kv_heads * own for total, own in zip((held, read), of_head, strict=True)
                )
            else:
                own = layer.nbytes(tokens)
                held, read = held + own, read + own
        return held, read


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Work out what a model takes, from the shapes in a pass over a single token.

    Parameters
    ----------
    model : PreTrainedModel
        A model as `plphp.inputs.loading.empty_model` makes it, which must not be used afterwards: the way it computes
        its experts is changed.

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
    # Every other implementation looks at values, or at dtypes, that the meta device does not have.
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
        kv_heads=keys.shape[1],
        dims=(keys.shape[3], values.shape[3]),
    )


def _step_weights(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decoding step reads.

    Of the input embeddings that is a row for each sequence, which does not count, unless they are the output
    embeddings, too.
    """
    text = {id(weight): weight for weight in model.get_decoder().parameters()}
    for weight in model.get_input_embeddings().parameters():
        text.pop(id(weight), None)
    for weight in model.get_output_embeddings().parameters():
        text[id(weight)] = weight
    return _nbytes(text.values())


def _nbytes(weights: Any) -> int:
    return sum(weight.nbytes for weight in weights)
