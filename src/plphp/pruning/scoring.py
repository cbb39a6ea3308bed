# SPDX-License-Identifier: Apache-2.0
"""The scores that one stage of a method asks for: queries are gathered chunk by chunk, and score a layer at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.families.spans import VisionSpans, query_mask
from plphp.kernels import window_scores
from plphp.kernels.packed import PackedKV
from plphp.policy.bank import QueryBank, bank_at
from plphp.policy.evidence import Evidence, LayerScores, OwnBank
from plphp.policy.rotation import Rotation
from plphp.policy.states import LayerStates
from plphp.settings.config import PLPHPConfig

from .entries import LayerEntries
from .probe_rows import with_random_rows
from .rotary_positions import rotary_positions
from .row_weights import row_weights
from .tail_tokens import TailTokens
from .turned_rows import TurnedRows


@dataclass(frozen=True)
class Attended:
    """A decoder layer that has just attended to a chunk of tokens.

    Parameters
    ----------
    layer : int
        Number of the decoder layer.
    query : Tensor
        [batch, q_heads, chunk, dim]; post-RoPE queries of the chunk.
    entries : LayerEntries
        What the layer holds; the keys of the chunk are the last of its tail.
    scaling : float
        Factor on the logits.
    """

    layer: int
    query: Tensor
    entries: LayerEntries
    scaling: float

    @property
    def begin(self) -> int:
        """Where the first token of the chunk stands in the tail."""
        return self.entries.tail_length - self.query.shape[2]


@dataclass
class Scoring:
    """The scores of the layers of one prompt, for one stage of a method.

    Parameters
    ----------
    spans : VisionSpans
        Where the vision tokens are.
    queries : Tensor
        bool [batch, seq]; the prompt tokens whose attention scores the entries.
    evidence : Evidence
        What is worked out of their attention.
    gqa_reduction : {"mean", "max"}
        For the evidence that combines query heads.
    rope_delta : Tensor, optional
        int64 [batch, 1]; what rotary positions are ahead of the number of tokens, in models with m-RoPE.
    rotations : mapping of int to Rotation
        Rotary position embeddings by decoder layer, where the evidence asks for them.
    own_bank : QueryBank, optional
        The bank that the engine has collected, for evidence that asks for such a bank.
    turned : TurnedRows, optional
        The prompt's own queries that ask from behind it, for evidence that asks for them.

    Attributes
    ----------
    scores : dict of int to LayerScores
        By decoder layer, for the layers that have read the whole prompt.
    unranked : dict of int to list of int
        By decoder layer, the rows that cannot be ranked, see `plphp.pruning.finite.UnrankedRows`.
    """

    spans: VisionSpans
    queries: Tensor
    evidence: Evidence
    gqa_reduction: str = "mean"
    rope_delta: Tensor | None = None
    rotations: Mapping[int, Rotation] = field(default_factory=dict)
    own_bank: QueryBank | None = None
    turned: TurnedRows | None = None
    scores: dict[int, LayerScores] = field(default_factory=dict)
    unranked: dict[int, list[int]] = field(default_factory=dict)
    _gathered: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    """By layer, queries [batch, q_heads, columns, dim] with their places in the tail, int64 [columns]."""

    @classmethod
    def of(
        cls,
        spans: VisionSpans,
        config: PLPHPConfig,
        evidence: Evidence,
        rope_delta: Tensor | None = None,
        rotations: Callable[[], Mapping[int, Rotation]] | None = None,
        own_bank: QueryBank | None = None,
    ) -> Scoring:
        """Ask for the evidence of a method, by the config's ``query_rows`` if set, else by the method's own.

        Raises
        ------
        UnsupportedFeatureError
            If it asks for rotary position embeddings, which ``rotations`` looks up, and the engine does not know them.
        """
        rows = evidence.rows if config.query_rows is None else config.query_rows
        own = replace(evidence, rows=rows)
        if evidence.turns_queries and rotations is None:
            raise UnsupportedFeatureError(
                f"The method {config.method!r} turns queries by the rotary embedding of the model, which this engine "
                "does not know: use another method."
            )
        known = rotations() if evidence.turns_queries and rotations is not None else {}
        turned = None
        if evidence.turned_rows is not None:
            turned = TurnedRows.of(spans, rope_delta, evidence.turned_rows, evidence.turned_ahead)
        queries = with_random_rows(query_mask(spans, rows), spans, evidence.random_rows, config.seed)
        return cls(spans, queries, own, config.gqa_reduction, rope_delta, known, own_bank, turned)

    def asks_as(self, scoring: Scoring) -> bool:
        """Whether both ask the same of every layer of one prompt, so that the scores of one serve for both."""
        alike = (self.evidence, self.gqa_reduction) == (scoring.evidence, scoring.gqa_reduction)
        return alike and torch.equal(self.queries, scoring.queries)  # seeds may differ

    def repeat(self, times: int) -> None:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        self.spans = self.spans.repeated(times)
        self.queries = self.queries.repeat_interleave(times, dim=0)
        if self.rope_delta is not None:
            self.rope_delta = self.rope_delta.repeat_interleave(times, dim=0)
        if self.turned is not None:
            self.turned.repeat(times)

    def gather(self, attended: Attended) -> None:
        """Copy the queries of a chunk that will score the entries, or that the method asks for."""
        query, tokens = attended.query, attended.entries.tail_tokens
        chunk = tokens.of(self._gathering(), False)[:, attended.begin :]
        columns = chunk.any(0).nonzero()[:, 0]
        if len(columns):
            part = query[:, :, columns.to(query.device)], columns + attended.begin
            self._gathered.setdefault(attended.layer, []).append(part)
        if self.turned is not None:
            self.turned.gather(attended.layer, query, tokens, attended.begin)

    def score(self, attended: Attended) -> None:
        """Note the scores of a layer that has read the whole prompt.

        Parameters
        ----------
        attended : Attended
            The layer; its tail holds the keys of the prompt, but for tokens that have left before it, and nothing of it
            has been evicted.
        """
        queries, index = zip(*self._gathered.pop(attended.layer), strict=True)
        self.scores[attended.layer] = self._scored(attended, torch.cat(queries, dim=2), torch.cat(index))

    def _gathering(self) -> Tensor:
        """bool [batch, seq]; the tokens whose queries are kept until a layer has read the prompt."""
        if self.evidence.states != "prompt":
            return self.queries
        new = torch.arange(self.spans.end, device=self.spans.valid.device) >= self.spans.start
        return self.queries | (self.spans.valid & new)

    def _scored(self, attended: Attended, gathered: Tensor, index: Tensor) -> LayerScores:
        keys, values = attended.entries.tail()
        tokens = attended.entries.tail_tokens
        valid = tokens.of(self.spans.valid, False).to(keys.device)
        segment = tokens.of(self.spans.segment, -1).to(keys.device)
        asked = tokens.of(self.queries, False)
        evictable = self._evictable(valid, asked.to(keys.device), tokens)
        asking = asked[:, index].any(0)
        own, own_index = gathered, index
        if not asking.all():
            own, own_index = gathered[:, :, asking.to(gathered.device)], index[asking]
        rows = self._rows(attended, own, asked[:, own_index], own_index, valid)
        placed = placed_keys(attended.entries, keys.dtype)
        mass = window_scores(
            *rows,
            keys,
            valid,
            placed,
            attended.scaling,
            peak=self.evidence.peak,
            best_position=self.evidence.best_position,
            density=self.evidence.density,
            among_rows=self.evidence.weigh_rows is not None,
            candidates=segment >= 0 if evictable is None else evictable,
            gqa_reduction=self.gqa_reduction,
        )
        weighted = None
        if self.evidence.weigh_rows is not None and mass.among_rows is not None:
            query, weight, index = rows
            weight = row_weights(self.evidence.weigh_rows, mass.among_rows, weight)
            window = query, weight, index, keys, valid, placed, attended.scaling
            weighted = window_scores(*window).attention
        return LayerScores(
            mass.attention,
            segment,
            valid,
            attended.layer,
            keys.shape[1],
            queries=asked.to(keys.device),
            evictable=evictable,
            peak=mass.peak,
            best_position=mass.best_position,
            density=mass.density,
            value_norm=_norms(values) if self.evidence.value_norm else None,
            weighted_attention=weighted,
            token_number=tokens.of(self.spans.valid.cumsum(1) - 1, 0).to(keys.device),
            states=None if self.evidence.states is None else self._states(attended, gathered, index, valid),
        )

    def _states(self, attended: Attended, queries: Tensor, index: Tensor, valid: Tensor) -> LayerStates:
        """Keys, values and the gathered queries of a layer; tokens that are not ``valid`` do not count."""
        tokens = attended.entries.tail_tokens
        gathered = tokens.of(self.queries if self.evidence.states == "rows" else self._gathering(), False)[:, index]
        rotary, end = rotary_positions(self.spans, self.rope_delta)
        return LayerStates(
            tail=attended.entries.tail,
            held={"queries": queries},
            asking=gathered.to(valid.device) & valid[:, index.to(valid.device)],
            index=index.to(valid.device),
            position=tokens.of(rotary, -1)[:, index].to(valid.device),
            end=end.to(valid.device),
            scaling=attended.scaling,
            rotation=self.rotations[attended.layer] if self.evidence.rotation else None,
        )

    def _rows(
        self, attended: Attended, own: Tensor, asking: Tensor, index: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries that ask, their weights, and their indices in the tail, see `plphp.kernels.window_scores`."""
        if self.turned is not None:
            rotation = self.rotations[attended.layer]
            return self.turned.turned(attended.layer, rotation, valid, attended.entries.tail_tokens)
        bank = None
        if self.evidence.bank is not None:
            bank = self._rows_of_bank(self._bank(self.evidence.bank), attended.layer, own, valid.shape[1])
            if not self.evidence.beside_rows:
                return bank
        asking = asking.float()
        weight = (asking / asking.sum(1, keepdim=True)).to(valid.device)
        rows = own, weight, index.to(valid.device)
        if bank is None:
            return rows
        # Each query counts as much as any other.
        share = (asking.sum(1, keepdim=True) / (asking.sum(1, keepdim=True) + bank[1].shape[1])).to(valid.device)
        return (
            torch.cat([own.float(), bank[0].float()], dim=2),
            torch.cat([weight * share, bank[1] * (1 - share)], dim=1),
            torch.cat([rows[2], bank[2]]),
        )

    def _bank(self, asked: str | OwnBank) -> QueryBank:
        """The bank that the evidence asks for."""
        if isinstance(asked, str):
            return bank_at(asked)
        if self.own_bank is None:
            raise ConfigError("The method asks for a query bank that the engine collects, and there is none yet.")
        return self.own_bank

    def _rows_of_bank(self, bank: QueryBank, layer: int, own: Tensor, seq: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of answers behind the prompt, in the place of the prompt's ``own`` [batch, q_heads, window, dim]."""
        begin = self.spans.valid.sum(1, keepdim=True)
        if self.rope_delta is not None:
            begin = begin + self.rope_delta.to(begin.device)
        position = (begin + bank.ahead).to(own.device)
        queries = bank.of(layer).at(position, own.shape[1], own.shape[3])
        samples = position.shape[1]
        weight = torch.full(position.shape, 1 / samples, dtype=torch.float32, device=own.device)
        return queries, weight, torch.full((samples,), seq, device=own.device)

    def _evictable(self, valid: Tensor, asked: Tensor, tokens: TailTokens) -> Tensor | None:
        """The candidates where text competes, bool [batch, seq]: what stands before the first query of the prompt."""
        if self.evidence.candidates == "vision":
            return None
        new = (torch.arange(self.spans.end) >= self.spans.start).expand_as(self.spans.valid)
        return valid & tokens.of(new, False).to(valid.device) & (asked.cumsum(1) == 0)


def _norms(values: Tensor) -> Tensor:
    """L2 norms of values [batch, kv_heads, seq, dim], float32 [batch, kv_heads, seq]."""
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.promote_types(values.dtype, torch.float32)).float()


def placed_keys(entries: LayerEntries, dtype: torch.dtype) -> PackedKV | None:
    """What queries see of a layer before its tail, codes as what they stand for: its keys, in a dtype; values mean
    nothing."""
    if entries.prefix is None or not entries.coded:
        return entries.prefix
    placed = entries.prefix.to(dtype, dtype)
    placed = replace(placed, values=placed.keys)
    for block in entries.coded:
        for tier in block.decoded(dtype, values=False):
            placed = placed.appended(tier)
    return placed
