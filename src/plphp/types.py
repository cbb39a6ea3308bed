# SPDX-License-Identifier: Apache-2.0
"""The frozen types that flow from one step to the next.

Axis names: batch, layer, q_heads, kv_heads, seq, dim, kept. A *row* is one prompt of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

LayerClass = Literal["attentive", "balanced", "indifferent", "uniform", "exempt", "no-vision"]


@dataclass(frozen=True)
class VisionSpans:
    """Where the vision tokens of a batch of prompts stand, in logical positions (0 is the first token seen).

    Parameters
    ----------
    segment : Tensor
        int64 [batch, seq]; number of the image within its row, -1 where there is no vision token to prune.
    real : Tensor
        bool [batch, seq]; False on padding.
    start : int
        First position of the new prompt: what the cache held before it was planned.
    grids : tuple
        Per row, per image: ``(frames, height, width)`` in tokens or None.
    """

    segment: Tensor
    real: Tensor
    start: int
    grids: tuple[tuple[tuple[int, int, int] | None, ...], ...]

    @property
    def vision(self) -> Tensor:
        """bool [batch, seq]; True on the vision tokens of the new prompt."""
        return self.segment >= 0

    @property
    def end(self) -> int:
        """Position after the last prompt token."""
        return self.segment.shape[1]

    def repeated(self, times: int) -> VisionSpans:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        return VisionSpans(
            segment=self.segment.repeat_interleave(times, dim=0),
            real=self.real.repeat_interleave(times, dim=0),
            start=self.start,
            grids=tuple(grid for grid in self.grids for _ in range(times)),
        )


@dataclass(frozen=True)
class LayerScores:
    """What a layer's prefill attention says about the entries that may be evicted.

    Parameters
    ----------
    attention : Tensor
        float32 [batch, q_heads, seq]; softmax mass over *all* keys, averaged over the query rows (DESIGN: A).
    segment : Tensor
        int64 [batch, seq]; image number of each entry, -1 on text and padding.
    real : Tensor
        bool [batch, seq]; False on padding.
    layer : int
        Number of the decoder layer.
    kv_heads : int
        KV heads of the layer; ``q_heads`` is a multiple of it.
    """

    attention: Tensor
    segment: Tensor
    real: Tensor
    layer: int
    kv_heads: int

    @property
    def vision(self) -> Tensor:
        """bool [batch, seq]; True on vision tokens."""
        return self.segment >= 0

    def vision_score(self) -> Tensor:
        """float32 [batch]; the layer's vision attention score gamma, in [0, 1]."""
        masked = self.attention.masked_fill(~self.vision[:, None], 0)
        return masked.sum(-1).mean(-1)


@dataclass(frozen=True)
class RowAllocation:
    """What the layer level decided for one layer and one row.

    Parameters
    ----------
    vision_score : float
        Vision attention score gamma, in [0, 1].
    layer_class : str
        Class of the layer for this prompt.
    rate : float
        Retention rate, in [0, 1].
    """

    vision_score: float
    layer_class: LayerClass
    rate: float
