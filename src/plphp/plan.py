# SPDX-License-Identifier: Apache-2.0
"""A prompt that is being read: its spans, the queries gathered so far, and the scores of the layers that are done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import PLPHPConfig
from .errors import ConfigError, NonFiniteAttentionError
from .kernels import window_scores
from .layer import PrunedLayer
from .methods.base import Method
from .spans import query_mask
from .types import LayerScores, RowAllocation, VisionSpans


@dataclass
class PromptPlan:
    """What a cache has to know to prune one prompt, which may come in several chunks.

    Parameters
    ----------
    spans : VisionSpans
        Where the vision tokens are.
    queries : Tensor
        bool [batch, seq]; the prompt tokens whose attention ranks them.
    custom : bool
        Whether the caller named the vision tokens with a mask.
    """

    spans: VisionSpans
    queries: Tensor
    custom: bool
    scores: dict[int, LayerScores] = field(default_factory=dict)
    _gathered: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(cls, spans: VisionSpans, config: PLPHPConfig, *, custom: bool) -> PromptPlan:
        """Plan a prompt with the config's ``query_rows``."""
        return cls(spans, query_mask(spans, config), custom)

    @property
    def batch(self) -> int:
        """Rows of the prompt."""
        return self.spans.segment.shape[0]

    def repeat(self, times: int) -> None:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        self.spans = self.spans.repeated(times)
        self.queries = self.queries.repeat_interleave(times, dim=0)

    def gather(self, layer_idx: int, query: Tensor, begin: int) -> None:
        """Hold on to the queries of a chunk that will rank the vision tokens.

        Parameters
        ----------
        layer_idx : int
            Decoder layer.
        query : Tensor
            [batch, q_heads, chunk, dim]; post-RoPE.
        begin : int
            Logical position of the chunk's first token.
        """
        columns = self.queries[:, begin : begin + query.shape[2]].any(0).nonzero()[:, 0]
        if len(columns):
            chosen = query[:, :, columns.to(query.device)]
            self._gathered.setdefault(layer_idx, []).append((chosen, columns + begin))

    def score(self, layer_idx: int, layer: PrunedLayer, scaling: float) -> None:
        """Note the scores of a layer that has read the whole prompt."""
        queries, columns = zip(*self._gathered.pop(layer_idx), strict=True)
        position = torch.cat(columns)
        wanted = self.queries[:, position].float()
        keys, _ = layer.tail()
        tail = slice(layer.prefix_length, self.spans.end)
        real = self.spans.real[:, tail].to(keys.device)
        attention = window_scores(
            torch.cat(queries, dim=2),
            (wanted / wanted.sum(1, keepdim=True)).to(keys.device),
            (position - layer.prefix_length).to(keys.device),
            keys,
            real,
            layer.prefix,
            scaling,
        )
        segment = self.spans.segment[:, tail].to(keys.device)
        self.scores[layer_idx] = LayerScores(attention, segment, real, layer_idx, keys.shape[1])

    def allocate(self, method: Method, config: PLPHPConfig, layers: int) -> dict[int, list[RowAllocation]]:
        """Layer level: an allocation for each row of each scored layer.

        Parameters
        ----------
        method : Method
            Gives the rates.
        config : PLPHPConfig
            Its settings, and the exempt layers.
        layers : int
            Decoder layers of the model, from which negative exempt layers count.

        Raises
        ------
        NonFiniteAttentionError
            If the vision attention score of a layer is not finite.
        ConfigError
            If the method gives a rate outside of [0, 1].
        """
        gammas = {layer: scores.vision_score().tolist() for layer, scores in self.scores.items()}
        for layer, gamma in gammas.items():
            if not all(map(math.isfinite, gamma)):
                raise NonFiniteAttentionError(f"the attention of layer {layer} is {gamma}, expected finite numbers")
        exempt = {layer % layers for layer in config.exempt_layers} & gammas.keys()
        judged = [layer for layer in gammas if layer not in exempt]
        allocation = {layer: [RowAllocation(gamma, "exempt", 1.0) for gamma in gammas[layer]] for layer in exempt}
        if judged:
            chosen = method.allocate([gammas[layer] for layer in judged], config)
            allocation.update(zip(judged, chosen, strict=True))
            rates = [row.rate for rows in chosen for row in rows]
            if not all(0 <= rate <= 1 for rate in rates):
                raise ConfigError(f"the method {method.name!r} gave retention rates outside of [0, 1]: {rates}")
        for row, has_vision in enumerate(self.spans.vision.any(1).tolist()):
            if not has_vision:
                for rows in allocation.values():
                    rows[row] = RowAllocation(0.0, "no-vision", 1.0)
        return allocation
