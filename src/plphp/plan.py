# SPDX-License-Identifier: Apache-2.0
"""A prompt that is being read: its spans, the queries gathered so far, and the scores of the layers that are done."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import PLPHPConfig
from .kernels import window_scores
from .layer import PrunedLayer
from .spans import query_mask
from .types import LayerScores, VisionSpans


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
