# SPDX-License-Identifier: Apache-2.0
"""What a model's weights and KV cache take in bytes, and its layers in operations, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.layer import layer_nbytes
from plphp.errors import UnsupportedModelError
from plphp.io.quoting import one_line
from plphp.methods.zipvl import PROBE_ROWS
from plphp.policy.allocation import kept_count

from .flops import PassFlops, counted_layers
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
    token_flops : int
        Operations of the products of a token with weights.
    pair_flops : int
        Operations for each key that a query attends to, over all query heads.
    """

    entry_bytes: int
    window: int | None
    state_bytes: int
    prunable: bool
    kv_heads: int = 0
    dims: tuple[int, int] = (0, 0)
    token_flops: int = 0
    pair_flops: int = 0

    def nbytes(self, tokens: int) -> int:
        """Bytes that it holds of so many tokens, all of them whole."""
        return self.state_bytes + self.entry_bytes * (tokens if self.window is None else min(tokens, self.window))

    def flops(self, tokens: int, prompt: int, attending: int | None = None) -> int:
        """Operations that reading the first tokens of a prompt takes at least.

        Parameters
        ----------
        tokens : int
            Tokens that the layer gets.
        prompt : int
            Tokens of the prompt.
        attending : int, optional
            Those of the tokens that a layer with full attention attends among; it finds them by the logits of probe
            rows, as many as `plphp.methods.zipvl` has by default. All of them, without probe rows, where not given.
        """
        if attending is not None and self.prunable:
            probed = min(PROBE_ROWS, tokens) * tokens * self.pair_flops // 2  # of a pair, without the value
            return tokens * self.token_flops + _causal_pairs(attending) * self.pair_flops + probed
        # A layer with a window counts as if its parts saw themselves alone, and as if what left were spread over all.
        parts = 1 if self.window is None else max(1, -(-prompt // self.window))
        each, more = divmod(tokens, parts)
        pairs = (parts - more) * _causal_pairs(each) + more * _causal_pairs(each + 1)
        return tokens * self.token_flops + pairs * self.pair_flops


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
    head_flops : int
        Operations of the output embeddings for a token.
    """

    weight_bytes: int
    step_weight_bytes: int
    experts: bool
    layers: tuple[LayerCost, ...]
    head_flops: int = 0

    def kv_bytes(
        self,
        tokens: int,
        vision_tokens: int = 0,
        retention: float = 1.0,
        tiers: TierCost | None = None,
        there: Sequence[int] | None = None,
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
        there : sequence of int, optional
            By layer, the vision tokens that it gets; all of them where that is not said.

        Raises
        ------
        UnsupportedFeatureError
            If a rung cannot hold keys and values of such widths.
        """
        there = self._there(vision_tokens, there)
        text = tokens - vision_tokens
        if tiers is not None:
            return round(self._in_tiers(text, there, tiers)[0])
        evicted = [vision - kept_count(retention, vision, min_kept=1) for vision in there]
        return sum(
            layer.nbytes(text + vision) - layer.entry_bytes * gone * layer.prunable
            for layer, vision, gone in zip(self.layers, there, evicted, strict=True)
        )

    def read_bytes(self, tokens: int, vision_tokens: int, tiers: TierCost, there: Sequence[int] | None = None) -> int:
        """Bytes that a decoding step reads at most of what `kv_bytes` counts."""
        return round(self._in_tiers(tokens - vision_tokens, self._there(vision_tokens, there), tiers)[1])

    def prefill_flops(
        self,
        text_tokens: int,
        vision_tokens: int,
        there: Sequence[int] | None = None,
        attending: Sequence[int] | None = None,
    ) -> int:
        """Operations that the text model takes at least to read a prompt, up to its first new token.

        Parameters
        ----------
        text_tokens, vision_tokens : int
            Tokens of the prompt.
        there : sequence of int, optional
            By layer, the vision tokens that it gets; all of them where that is not said.
        attending : sequence of int, optional
            By layer, those of them that attend in it, if it has full attention; all of them where that is not said.
        """
        there = self._there(vision_tokens, there)
        among = [None] * len(there) if attending is None else [text_tokens + vision for vision in attending]
        return self.head_flops + sum(
            layer.flops(text_tokens + vision, text_tokens + vision_tokens, own)
            for layer, vision, own in zip(self.layers, there, among, strict=True)
        )

    def book_bytes(self, tiers: TierCost) -> int:
        """Bytes of the codebooks that tiers need, for all sequences together."""
        if not tiers.needs_books:
            return 0
        return sum(book_nbytes(layer.kv_heads, layer.dims) for layer in self.layers if layer.prunable)

    def _there(self, vision_tokens: int, there: Sequence[int] | None) -> Sequence[int]:
        return [vision_tokens] * len(self.layers) if there is None else there

    def _in_tiers(self, text: int, there: Sequence[int], tiers: TierCost) -> tuple[float, float]:
        """Bytes that are held for a sequence, and those that a decoding step reads at most."""
        held = read = 0.0
        for layer, vision in zip(self.layers, there, strict=True):
            if layer.prunable:
                tiers.check(layer.dims)
                of_head = tiers.head_bytes(vision, layer.dims, layer.entry_bytes // layer.kv_heads)
                whole = layer.state_bytes + layer.entry_bytes * text
                held, read = (
                    total + whole + layer.kv_heads * own for total, own in zip((held, read), of_head, strict=True)
                )
            else:
                own = layer.nbytes(text + vision)
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
        with torch.no_grad(), counted_layers(model, len(cache.layers)) as flops:
            model(input_ids=token, **passed(cache), use_cache=True)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"The cache of {type(model).__name__} cannot be told from its configuration: {one_line(error)}"
        ) from error
    return ModelCost(
        weight_bytes=_nbytes(model.parameters()),
        step_weight_bytes=_step_weights(model),
        experts=any("experts" in name for name, _ in model.named_modules()),
        layers=tuple(_layer_cost(number, layer, flops) for number, layer in enumerate(cache.layers)),
        head_flops=sum(2 * weight.numel() for weight in model.get_output_embeddings().parameters() if weight.ndim > 1),
    )


def _layer_cost(number: int, layer: Any, flops: PassFlops) -> LayerCost:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        # What a recurrent state takes beside its weights is left out: it depends on the kernel.
        return LayerCost(0, None, layer_nbytes(layer), prunable=False, token_flops=flops.weights[number])
    return LayerCost(
        entry_bytes=keys[:, :, 0].nbytes + values[:, :, 0].nbytes,
        window=getattr(layer, "sliding_window", None),
        state_bytes=0,
        prunable=type(layer) is DynamicLayer,
        kv_heads=keys.shape[1],
        dims=(keys.shape[3], values.shape[3]),
        token_flops=flops.weights[number],
        pair_flops=flops.attention[number],
    )


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


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
