# SPDX-License-Identifier: Apache-2.0
"""A prompt's own queries, turned to just behind the prompt, from where they see all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans, query_mask
from plphp.policy.evidence import SINKS
from plphp.policy.rotation import Rotation

from .rotary_positions import rotary_positions
from .tail_tokens import TailTokens


@dataclass
class TurnedRows:
    """Queries of some tokens of a prompt, evenly spread over it; each row of the batch has its own.

    Rows of the batch that have fewer tokens to ask with have surplus slots behind them, which count for nothing.

    Parameters
    ----------
    index : Tensor
        int64 [batch, rows]; logical position of the token of each query, any where there is none.
    counts : Tensor
        bool [batch, rows]; False on surplus slots.
    turn : Tensor
        int64 [batch, rows]; how many positions each query is turned on.
    """

    index: Tensor
    counts: Tensor
    turn: Tensor
    _held: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the queries gathered so far, [batch, q_heads, rows, dim]; 0 where there is none yet."""

    @classmethod
    def of(cls, spans: VisionSpans, rope_delta: Tensor | None, rows: int, ahead: int) -> TurnedRows:
        """Choose the tokens whose queries ask.

        They are tokens of this turn's prompt whose rotary position is known, vision and text alike, without the first
        of the conversation. Where a row of the batch has none of them, its last token asks, as it is if its position
        is not known.

        Parameters
        ----------
        spans : VisionSpans
            Where the vision tokens are.
        rope_delta : Tensor, optional
            int64 [batch, 1]; what rotary positions are ahead of the number of tokens, in models with m-RoPE.
        rows : int
            The most tokens of each row of the batch.
        ahead : int
            How many tokens behind the first place behind the prompt they ask from.
        """
        position, end = rotary_positions(spans, rope_delta)
        number = spans.valid.cumsum(1) - 1
        new = torch.arange(spans.end, device=number.device) >= spans.start
        asking = spans.valid & new & (position >= 0) & (number >= SINKS)
        asking = torch.where(asking.any(1, keepdim=True), asking, query_mask(spans, 1))
        tokens = asking.sum(1, keepdim=True)
        taken = tokens.clamp(max=rows)
        slot = torch.arange(int(taken.max()), device=number.device)
        counts = slot < taken
        # The last token is always among them: unlike a vision token, it never leaves inside prefill.
        nth = ((slot + 1) * tokens // taken - 1).where(counts, 0)
        index = (~asking).long().argsort(dim=1, stable=True).gather(1, nth)
        own = position.gather(1, index)
        return cls(index, counts, (end + ahead - own).where(counts & (own >= 0), 0))

    def gather(self, layer: int, query: Tensor, tokens: TailTokens, begin: int) -> None:
        """Copy those of the queries that a chunk of a layer has.

        Parameters
        ----------
        layer : int
            Number of the decoder layer.
        query : Tensor
            [batch, q_heads, chunk, dim]; post-RoPE queries of the chunk.
        tokens : TailTokens
            The tokens of the layer's tail.
        begin : int
            Where the first token of the chunk stands in the tail.
        """
        batch, q_heads, chunk, dim = query.shape
        # Tokens of later chunks have no place yet.
        known = self.index.clamp(max=tokens.end - 1)
        place = torch.where(self.index < tokens.end, tokens.place(known), -1)
        place = (place - begin).to(query.device)
        inside = (place >= 0) & (place < chunk) & self.counts.to(query.device)
        where = place.clamp(0, chunk - 1)[:, None, :, None].expand(batch, q_heads, -1, dim)
        part = query.gather(2, where)
        before = self._held.get(layer, torch.zeros_like(part))
        self._held[layer] = torch.where(inside[:, None, :, None], part, before)

    def turned(
        self, layer: int, rotation: Rotation, valid: Tensor, tokens: TailTokens
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries of a layer that has read the whole prompt, which are let go.

        Parameters
        ----------
        layer : int
            Number of the decoder layer.
        rotation : Rotation
            Its rotary position embedding.
        valid : Tensor
            bool [batch, seq]; the entries of the tail that are neither padding nor have left before this layer.
        tokens : TailTokens
            The tokens of the tail.

        Returns
        -------
        tuple of Tensor
            Queries, float32 [batch, q_heads, rows, dim]; their weights, float32 [batch, rows], which sum to 1 in each
            row of the batch; their indices in the tail, int64 [rows]: all of it is seen. See
            `plphp.kernels.window_scores`.
        """
        queries = rotation.rotated(self._held.pop(layer), self.turn.to(valid.device)[:, None])
        place = tokens.place(self.index).to(valid.device)
        counts = (self.counts.to(valid.device) & (place >= 0) & valid.gather(1, place.clamp(min=0))).float()
        weight = counts / counts.sum(1, keepdim=True)
        return queries, weight, torch.full((weight.shape[1],), valid.shape[1], device=valid.device)

    def repeat(self, times: int) -> None:
        """Repeat every row of the batch; nothing has been gathered yet."""
        self.index = self.index.repeat_interleave(times, dim=0)
        self.counts = self.counts.repeat_interleave(times, dim=0)
        self.turn = self.turn.repeat_interleave(times, dim=0)
