# SPDX-License-Identifier: Apache-2.0
"""A prompt that is being read: its spans, the queries gathered so far, and the scores of the layers that are done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from plphp.engines.hf.layer import PrunedLayer
from plphp.errors import ConfigError, SpanError
from plphp.families.spans import VisionSpans, query_mask
from plphp.kernels import window_scores
from plphp.policy.allocation import RowAllocation, ScoredLayer
from plphp.policy.bank import bank_at
from plphp.policy.evidence import PLAIN, Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.rankers import pooled
from plphp.policy.selection import keep_masks
from plphp.settings.config import PLPHPConfig

from .finite import refuse, warn

Gathered = tuple[Tensor, Tensor]
"""Queries [batch, q_heads, columns, dim] and their logical positions, int64 [columns]."""
Chosen = tuple[LayerScores, list[list[RowAllocation]], Tensor, Tensor | None]
"""Scores of a layer, by config the allocation of its rows, what its heads keep, bool [config, batch, kv_heads, seq],
and the scores that chose it, [batch, kv_heads, seq]; None where tokens leave at the prompt stage."""
LAYER_LEVEL = (
    "retention_rate",
    "retention_delta",
    "attentive_threshold",
    "indifferent_threshold",
    "target_retention",
    "class_quantile",
)
"""Settings that say how much is kept, and nothing of what."""


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
    evidence : Evidence
        What is worked out of their attention.
    gqa_reduction : {"mean", "max"}
        For the evidence that combines query heads.
    rope_delta : Tensor, optional
        int64 [batch, 1]; what rotary positions are ahead of the number of tokens, in models with m-RoPE.
    features : mapping of str to list of Tensor, optional
        Image features of the prompt, to say why attention is not finite.
    hidden : Tensor, optional
        bool [batch, seq]; vision tokens that have left, from the layer ``hidden_from`` on.
    """

    spans: VisionSpans
    queries: Tensor
    custom: bool
    evidence: Evidence
    gqa_reduction: str = "mean"
    rope_delta: Tensor | None = None
    features: Mapping[str, Sequence[Tensor]] | None = None
    hidden: Tensor | None = None
    hidden_from: int = 0
    scores: dict[int, LayerScores] = field(default_factory=dict)
    _copies: int = 1
    _not_finite: dict[int, list[int]] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)
    _gathered: dict[int, list[Gathered]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        spans: VisionSpans,
        config: PLPHPConfig,
        evidence: Evidence = PLAIN,
        *,
        custom: bool,
        rope_delta: Tensor | None = None,
    ) -> PromptPlan:
        """Plan a prompt with the evidence that a method asks for, and the config's ``query_rows`` if set."""
        rows = evidence.rows if config.query_rows is None else config.query_rows
        own = replace(evidence, rows=rows)
        return cls(spans, query_mask(spans, rows), custom, own, config.gqa_reduction, rope_delta)

    @property
    def batch(self) -> int:
        """Rows of the prompt."""
        return self.spans.segment.shape[0]

    def repeat(self, times: int) -> None:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        self.spans = self.spans.repeated(times)
        self.queries = self.queries.repeat_interleave(times, dim=0)
        self._copies *= times
        if self.rope_delta is not None:
            self.rope_delta = self.rope_delta.repeat_interleave(times, dim=0)

    def check_shape(self, rows: int, tokens: int) -> None:
        """Raise `SpanError` unless a prompt has the shape of this one."""
        planned = self.spans.real.shape
        if (rows, tokens) != planned:
            raise SpanError(
                f"The cache was planned for {planned[0]} rows of {planned[1]} tokens, got {rows} rows of {tokens}: "
                "pass the inputs that it was made for, or make a new one."
            )

    def check_length(self, tokens: int) -> None:
        """Raise `SpanError` if more tokens are read than the prompt has."""
        if tokens > self.spans.end:
            raise SpanError(
                f"The cache was planned for a prompt of {self.spans.end} tokens and would hold {tokens}: pass the "
                "inputs that it was made for, or call cache.plan(inputs) first."
            )

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
        gathered = gather(self.queries, query, begin)
        if gathered is not None:
            self._gathered.setdefault(layer_idx, []).append(gathered)

    def score(self, layer_idx: int, layer: PrunedLayer, scaling: float) -> None:
        """Note the scores of a layer that has read the whole prompt."""
        self.score_with(self._gathered.pop(layer_idx), layer_idx, layer, scaling)

    def score_with(self, gathered: Sequence[Gathered], layer_idx: int, layer: PrunedLayer, scaling: float) -> None:
        """The same with queries from elsewhere; those that the plan does not ask for are left out."""
        queries, columns = zip(*gathered, strict=True)
        position = torch.cat(columns)
        wanted = self.queries[:, position].float()
        keys, values = layer.tail()
        tail = slice(layer.prefix_length, self.spans.end)
        real = self.spans.real[:, tail]
        if self.hidden is not None and layer_idx >= self.hidden_from:
            real = real & ~self.hidden[:, tail]
        real = real.to(keys.device)
        segment = self.spans.segment[:, tail].to(keys.device)
        asked = self.queries[:, tail].to(keys.device)
        own = torch.cat(queries, dim=2)
        if self.evidence.bank is None:
            weight = (wanted / wanted.sum(1, keepdim=True)).to(keys.device)
            rows = own, weight, (position - layer.prefix_length).to(keys.device)
        else:
            rows = self._from_bank(self.evidence.bank, layer_idx, own, keys.shape[2])
        found = window_scores(
            *rows,
            keys,
            real,
            layer.prefix,
            scaling,
            peak=self.evidence.peak,
            best_position=self.evidence.best_rank,
            density=self.evidence.density,
            vision=segment >= 0,
            gqa_reduction=self.gqa_reduction,
        )
        evictable = None
        if self.evidence.candidates == "prompt":
            new = torch.arange(tail.start, tail.stop, device=keys.device) >= self.spans.start
            evictable = real & new & (asked.cumsum(1) == 0)
        self.scores[layer_idx] = LayerScores(
            found.attention,
            segment,
            real,
            layer_idx,
            keys.shape[1],
            queries=asked,
            evictable=evictable,
            peak=found.peak,
            best_rank=found.best_position,
            density=found.density,
            value_norm=_norms(values) if self.evidence.value_norm else None,
        )

    def _from_bank(self, name: str, layer_idx: int, own: Tensor, seq: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of answers behind the prompt, in the place of the prompt's ``own`` [batch, q_heads, window, dim].

        Also their weights and their places in the tail, see `plphp.kernels.window_scores`.
        """
        bank = bank_at(name)
        begin = self.spans.real.sum(1, keepdim=True)
        if self.rope_delta is not None:
            begin = begin + self.rope_delta.to(begin.device)
        position = (begin + bank.ahead).to(own.device)
        queries = bank.of(layer_idx).at(position, own.shape[1], own.shape[3])
        samples = position.shape[1]
        weight = torch.full(position.shape, 1 / samples, dtype=torch.float32, device=own.device)
        return queries, weight, torch.full((samples,), seq, device=own.device)

    def withdraw(self, layer_idx: int, method: Method, config: PLPHPConfig, layers: int) -> None:
        """Let a method of the prompt stage take vision tokens out, once the layer before has been scored."""
        if method.stage is None or layer_idx != method.stage.first(config, layers) - 1:
            return
        not_finite = self._set_aside(layer_idx)
        scores = self.scores[layer_idx]
        leaves = scores.vision & ~method.stage.stays(scores, config, layers)
        leaves[not_finite] = False
        # The answer goes on from the last token, whatever it is.
        leaves &= ~query_mask(self.spans, 1)[:, -leaves.shape[1] :].to(leaves.device)
        kept_before = self.spans.end - leaves.shape[1]
        self.hidden = torch.nn.functional.pad(leaves, (kept_before, 0)).cpu()
        self.hidden_from = layer_idx + 1

    def allocate(
        self, method: Method, configs: Sequence[PLPHPConfig], judged: Sequence[int]
    ) -> list[dict[int, list[RowAllocation]]]:
        """Layer level: for each config, an allocation for each row of each scored layer.

        Parameters
        ----------
        method : Method
            Gives the rates.
        configs : sequence of PLPHPConfig
            Its settings.
        judged : sequence of int
            The layers of the model that share the budget: those that are pruned and not exempt.

        Raises
        ------
        NonFiniteAttentionError
            If the attention of a layer is not finite in any row. Where some rows are, the others are kept whole.
        ConfigError
            If the method gives a rate outside of [0, 1].
        """
        not_finite = {layer: self._set_aside(layer) for layer in self.scores}
        gammas = {layer: scores.vision_score().tolist() for layer, scores in self.scores.items()}
        layers = [
            ScoredLayer(judged.index(layer), len(judged), gamma, self.scores[layer])
            for layer, gamma in gammas.items()
            if layer in judged
        ]
        has_vision = self.spans.vision.any(1).tolist()
        result = []
        for config in configs:
            chosen = method.allocate(layers, config) if layers else []
            rates = [row.rate for rows in chosen for row in rows]
            if not all(0 <= rate <= 1 for rate in rates):
                raise ConfigError(f"the method {method.name!r} gave retention rates outside of [0, 1]: {rates}")
            allocation = {
                layer: [RowAllocation(one, "exempt", 1.0) for one in gamma]
                for layer, gamma in gammas.items()
                if layer not in judged
            }
            allocation.update(zip([layer.scores.layer for layer in layers], chosen, strict=True))
            for layer, rows in allocation.items():
                rows[:] = [
                    one if vision else RowAllocation(0.0, "no-vision", 1.0)
                    for one, vision in zip(rows, has_vision, strict=True)
                ]
                for row in not_finite[layer]:
                    rows[row] = RowAllocation(0.0, "non-finite", 1.0 if self._is_whole(row, layer) else rows[row].rate)
            result.append(allocation)
        return result

    def _set_aside(self, layer: int) -> list[int]:
        """Rows with vision tokens whose scores in a layer are not finite, which are blanked; the first time they are
        named, or refused where they are all rows."""
        if layer in self._not_finite:
            return self._not_finite[layer]
        finite = self.scores[layer].finite().tolist()
        has_vision = self.spans.vision.any(1).tolist()
        rows = [row for row, (fine, vision) in enumerate(zip(finite, has_vision, strict=True)) if vision and not fine]
        self._not_finite[layer] = rows
        if rows:
            prompts = sorted({row // self._copies for row in rows})
            if len(rows) == self.batch:
                refuse(prompts, layer, self.features)
            news = [prompt for prompt in prompts if prompt not in self._named]
            if news:
                warn(news, layer, self.features)
            self._named.update(news)
            self.scores[layer] = self.scores[layer].blanked(rows)
        return rows

    def _is_whole(self, row: int, layer: int) -> bool:
        """Whether no token of a row has left before a layer."""
        return self.hidden is None or layer < self.hidden_from or not bool(self.hidden[row].any())

    def choose(self, method: Method, configs: Sequence[PLPHPConfig], judged: Sequence[int]) -> Iterator[Chosen]:
        """Both levels for every scored layer, see `allocate`; the configs may differ in `LAYER_LEVEL` alone."""
        allocations = self.allocate(method, configs, judged)
        for layer in allocations[0]:
            scores, rows = self.scores[layer], [allocation[layer] for allocation in allocations]
            if method.stage is not None:
                yield scores, rows, scores.real[:, None].expand(len(rows), -1, scores.kv_heads, -1), None
                continue
            rank = pooled(method.rank(scores, configs[0]), scores, configs[0])
            rates = [[row.rate for row in one] for one in rows]
            yield scores, rows, keep_masks(rank, scores, rates, configs[0], method.mix(configs[0])), rank


def gather(wanted: Tensor, query: Tensor, begin: int) -> Gathered | None:
    """Copy the queries [batch, q_heads, chunk, dim] of a chunk that ``wanted``, bool [batch, seq], marks in any row."""
    columns = wanted[:, begin : begin + query.shape[2]].any(0).nonzero()[:, 0]
    return (query[:, :, columns.to(query.device)], columns + begin) if len(columns) else None


def _norms(values: Tensor) -> Tensor:
    """L2 norms of values [batch, kv_heads, seq, dim], float32 [batch, kv_heads, seq]."""
    return torch.linalg.vector_norm(values, dim=-1, dtype=torch.promote_types(values.dtype, torch.float32)).float()
