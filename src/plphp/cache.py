# SPDX-License-Identifier: Apache-2.0
"""`PrunedCache`: a transformers cache whose vision entries are evicted per layer and per KV head."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .attachment import Attachment, Lease
from .config import PLPHPConfig
from .errors import CacheStateError, ConfigError, NonFiniteAttentionError, SpanError
from .kernels import window_scores
from .layer import PrunedLayer
from .methods.base import Method
from .registry import family_of, get_method
from .report import LayerRecord, PruneReport, build_report
from .selection import keep_mask
from .spans import find_spans, query_mask
from .types import LayerScores, RowAllocation, VisionSpans


@dataclass(frozen=True)
class PendingUpdate:
    """Rides on the keys that `PrunedCache.update` returns, so that the attention function finds its cache."""

    cache: PrunedCache
    layer: int


@dataclass
class _Window:
    """Queries of one layer that will rank the vision tokens, gathered over the chunks of a prompt."""

    queries: list[Tensor]
    positions: list[Tensor]


class PrunedCache(Cache):  # type: ignore[misc]
    """KV cache from which vision tokens are evicted as soon as a layer has read the prompt.

    Make it with `for_inputs` or let `plphp.prune` make it. Full-attention layers are pruned; sliding-window and
    linear-attention layers hold what transformers' own ``DynamicCache`` holds for them.

    See Also
    --------
    plphp.prune : the same as a context manager.
    """

    def __init__(self, attachment: Attachment, config: PLPHPConfig) -> None:
        model = attachment.model
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        super().__init__(layers=[PrunedLayer() if type(layer) is DynamicLayer else layer for layer in layers])
        self.config = config
        self.method: Method = get_method(config.method)
        self.records: list[LayerRecord] = []
        self.spans: VisionSpans | None = None
        self.pruning_seconds = 0.0
        self.attachment = attachment
        self._lease: Lease | None = None
        self._dead = ""
        self._pending: int | None = None
        self._forget_plan()
        self._pruned = [i for i, layer in enumerate(self.layers) if isinstance(layer, PrunedLayer)]
        _check_exempt_layers(config, len(self.layers))

    @classmethod
    def for_inputs(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        config: PLPHPConfig | None = None,
        *,
        vision_mask: Tensor | None = None,
    ) -> PrunedCache:
        """Make a cache for one batch of prompts.

        While the cache is alive the model's text layers use plphp's attention function, which treats every other
        cache as before; when it is freed the model is as it was.

        Parameters
        ----------
        model : PreTrainedModel
            A supported vision-language model.
        inputs : mapping
            What is passed to ``generate`` or to the model: ``input_ids``, ``attention_mask``, image features.
        config : PLPHPConfig, optional
            Default: ``PLPHPConfig()``.
        vision_mask : Tensor, optional
            bool [batch, seq]; the vision tokens, if they cannot be found from ``input_ids``.

        Returns
        -------
        PrunedCache
            Pass it as ``past_key_values``.

        Raises
        ------
        UnsupportedModelError, UnsupportedFeatureError, ConfigError, SpanError
        """
        lease = Lease.of(model)
        cache = cls(lease.attachment, config or PLPHPConfig())
        cache._lease = lease
        cache.plan(inputs, vision_mask=vision_mask)
        return cache

    def plan(self, inputs: Mapping[str, Any], *, vision_mask: Tensor | None = None) -> None:
        """Say what the next prompt is, so that its vision tokens are pruned at its end.

        ``generate`` calls it by itself; call it before a later turn that is given to ``model(...)`` directly.

        Parameters
        ----------
        inputs : mapping
            As for `for_inputs`; for a later turn the whole conversation.
        vision_mask : Tensor, optional
            bool [batch, seq] over the whole conversation.
        """
        self.check_alive()
        model = self.attachment.model
        self.spans = find_spans(
            family_of(model.config),
            model.config,
            inputs,
            past_length=self.get_seq_length(),
            vision_mask=vision_mask,
        )
        self._query_mask = query_mask(self.spans, self.config)
        self._custom_spans = vision_mask is not None
        self._windows = {}
        self._scores = {}
        # Text alone: nothing to evict, so nothing to compact either.
        self._planned = bool(self.spans.vision.any())

    @property
    def has_custom_spans(self) -> bool:
        """Whether a prompt was planned from a ``vision_mask`` and has not been read yet."""
        return self._custom_spans

    def _forget_plan(self) -> None:
        self._planned = self._custom_spans = False
        self._windows: dict[int, _Window] = {}
        self._scores: dict[int, LayerScores] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, see `Cache.update`."""
        self.check_alive()
        if self._pending is not None:
            self.kill(
                f"layer {self._pending} did not read it through plphp's attention function (is this model class "
                "a supported one, and was it compiled or changed while the cache was in use?)"
            )
        layer = self.layers[layer_idx]
        if not isinstance(layer, PrunedLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._check_in_step(layer_idx, key_states.shape[2])
        keys, values = layer.update(key_states, value_states)
        keys.plphp_pending = PendingUpdate(self, layer_idx)  # type: ignore[attr-defined]
        self._pending = layer_idx
        return keys, values

    def after_attention(self, layer_idx: int, query: Tensor, scaling: float) -> None:
        """Score, allocate, select and compact, once a layer has attended to the end of the prompt.

        Parameters
        ----------
        layer_idx : int
            Decoder layer.
        query : Tensor
            [batch, q_heads, query, dim]; post-RoPE queries of the newest tokens.
        scaling : float
            Factor on the logits.
        """
        self._pending = None
        if not self._planned or self.spans is None:
            return
        layer = self.layers[layer_idx]
        if query.shape[0] != self.spans.segment.shape[0]:
            self._expand_plan(query.shape[0])
        self._gather_queries(layer_idx, query)
        if layer.get_seq_length() < self.spans.end:
            return
        started = time.perf_counter()
        self._scores[layer_idx] = self._score(layer_idx, scaling)
        deferred = self.method.needs_all_layers(self.config)
        if not deferred or layer_idx == self._pruned[-1]:
            self._compact(self._scores)
            self._scores = {}
        self.pruning_seconds += time.perf_counter() - started
        if layer_idx == self._pruned[-1]:
            self._forget_plan()

    def _expand_plan(self, batch: int) -> None:
        """Repeat the plan's rows as ``generate`` repeated the prompts, for beams or several sequences."""
        assert self.spans is not None
        planned = self.spans.segment.shape[0]
        if batch % planned:
            self.kill(f"it was planned for {planned} rows and read {batch}")
        self.spans = self.spans.repeated(batch // planned)
        self._query_mask = self._query_mask.repeat_interleave(batch // planned, dim=0)

    def _gather_queries(self, layer_idx: int, query: Tensor) -> None:
        end = self.layers[layer_idx].get_seq_length()
        begin = end - query.shape[2]
        columns = self._query_mask[:, begin:end].any(0).nonzero()[:, 0]
        if len(columns):
            window = self._windows.setdefault(layer_idx, _Window([], []))
            window.queries.append(query[:, :, columns.to(query.device)])
            window.positions.append(columns + begin)

    def _score(self, layer_idx: int, scaling: float) -> LayerScores:
        assert self.spans is not None
        layer = self.layers[layer_idx]
        window = self._windows.pop(layer_idx)
        positions = torch.cat(window.positions)
        wanted = self._query_mask[:, positions].float()
        keys, _ = layer.tail()
        device = keys.device
        tail = slice(layer.prefix_length, self.spans.end)
        real = self.spans.real[:, tail].to(device)
        attention = window_scores(
            torch.cat(window.queries, dim=2),
            (wanted / wanted.sum(1, keepdim=True)).to(device),
            (positions - layer.prefix_length).to(device),
            keys,
            real,
            layer.prefix,
            scaling,
        )
        return LayerScores(attention, self.spans.segment[:, tail].to(device), real, layer_idx, keys.shape[1])

    def _compact(self, scores: dict[int, LayerScores]) -> None:
        """Allocate rates over the scored layers, then evict in each of them."""
        assert self.spans is not None
        gammas = {layer: one.vision_score().tolist() for layer, one in scores.items()}
        for layer, gamma in gammas.items():
            if not all(map(torch.isfinite, torch.tensor(gamma))):
                self.kill(f"the attention of layer {layer} is NaN", error=NonFiniteAttentionError)
        exempt = {layer % len(self.layers) for layer in self.config.exempt_layers}
        judged = [layer for layer in scores if layer not in exempt]
        rates = dict(
            zip(judged, self.method.allocate([gammas[layer] for layer in judged], self.config), strict=True)
            if judged
            else ()
        )
        for layer, one in scores.items():
            rows = rates.get(layer) or [RowAllocation(gamma, "exempt", 1.0) for gamma in gammas[layer]]
            vision = one.vision.any(1).tolist()
            rows = [
                row if has_vision else RowAllocation(0.0, "no-vision", 1.0)
                for row, has_vision in zip(rows, vision, strict=True)
            ]
            rank = self.method.rank(one, self.config)
            keep = keep_mask(rank, one, [row.rate for row in rows], self.config)
            start = self.layers[layer].prefix_length
            self.layers[layer].compact(keep)
            self.records.append(LayerRecord.of(self.spans, start, one, rows, keep))

    def report(self) -> PruneReport:
        """What was kept and evicted so far, and the bytes that the cache holds now.

        Returns
        -------
        PruneReport
        """
        return build_report(self, self.attachment.model)

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value tensors that are alive in the cache."""
        return sum(_layer_bytes(layer) for layer in self.layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that a dynamic cache would hold for the same tokens."""
        return sum(
            layer.full_nbytes if isinstance(layer, PrunedLayer) else _layer_bytes(layer) for layer in self.layers
        )

    def check_alive(self) -> None:
        """Raise `CacheStateError` if the cache cannot be used any more."""
        if self._dead:
            raise CacheStateError(f"This PrunedCache cannot be used any more: {self._dead}. Make a new one.")
        if not self.attachment.active:
            raise CacheStateError(
                "This PrunedCache is used outside the session that made it, where the model would read it wrongly: "
                "keep `with plphp.prune(model)` open, or make the cache with PrunedCache.for_inputs."
            )

    def kill(self, reason: str, error: type[Exception] = CacheStateError) -> None:
        """Mark the cache as dead, free its entries, and raise ``error``."""
        self._dead = reason
        self._pending = None
        for layer in self.layers:
            layer.reset()
        raise error(f"{reason[0].upper()}{reason[1:]}; this PrunedCache cannot be used any more.")

    def after_failure(self) -> None:
        """Decide after an exception whether the cache is still whole; if not, mark it as dead."""
        lengths = {self.layers[i].get_seq_length() for i in self._pruned}
        half_read = self._planned and self.spans is not None and max(lengths) > self.spans.start
        if not self._dead and (len(lengths) > 1 or self._pending is not None or half_read):
            self._dead = "an error stopped the model in the middle of a step"
            for layer in self.layers:
                layer.reset()

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        self.records, self.spans, self._pending = [], None, None
        self._forget_plan()

    def _check_in_step(self, layer_idx: int, new: int) -> None:
        """All layers have seen the same tokens before a forward pass, or it was cut off."""
        first, last = self._pruned[0], self._pruned[-1]
        seen = self.layers[layer_idx].get_seq_length()
        if layer_idx == first:
            in_step = seen == self.layers[last].get_seq_length()
        else:
            in_step = seen + new == self.layers[first].get_seq_length()
        if not in_step:
            self.kill("an error stopped the model in the middle of a step")
        if layer_idx == first and self._planned and self.spans and seen + new > self.spans.end:
            raise SpanError(
                f"The cache was planned for a prompt of {self.spans.end} tokens and would hold {seen + new}: pass the "
                "inputs that it was made for, or call cache.plan(inputs) first."
            )


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, PrunedLayer):
        return layer.nbytes
    tensors = [getattr(layer, name, None) for name in ("keys", "values")]
    for states in ("conv_states", "recurrent_states"):
        tensors += list(getattr(layer, states, None) or ())
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))


def _check_exempt_layers(config: PLPHPConfig, layers: int) -> None:
    for layer in config.exempt_layers:
        if not -layers <= layer < layers:
            raise ConfigError(f"exempt_layers names layer {layer}, but the model has the layers 0 to {layers - 1}.")
