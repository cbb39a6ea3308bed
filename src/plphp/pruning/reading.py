# SPDX-License-Identifier: Apache-2.0
"""The flow of one prompt, in any engine: gather, score, allocate, select, place.

`PromptReading.read` is the picture. An engine calls it whenever a decoder layer has attended to a chunk of the prompt,
and writes what comes back. What it brings itself: the spans of the prompt, a writer of what is placed, its refusals,
and where it needs them the two hooks ``join_heads`` and ``round_up``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from plphp.errors import ConfigError
from plphp.families.spans import VisionSpans
from plphp.kernels.precision import as_written
from plphp.policy.allocation import RowAllocation, ScoredLayer
from plphp.policy.bank import QueryBank
from plphp.policy.chain import Chain, Link
from plphp.policy.evidence import LayerScores
from plphp.policy.rotation import Rotation
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig

from .attending import Attending
from .coders import coders_of
from .finite import UnrankedRows
from .leaving import Leaving
from .packing import Packing
from .placement import LayerPlacement
from .scoring import Attended, Scoring
from .selecting import Budget, fading_score, placements

WORTH_A_COPY = 1 / 8
"""What a placement that is not final has to free of what a layer holds: in a batch, rows lose their rank one by one."""
Allocated = tuple[LayerScores, list[list[RowAllocation]]]
"""Scores of a layer, and by config what the layer level decided for each row."""


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


class PromptReading:
    """A prompt that is being read, which may come in several chunks.

    Parameters
    ----------
    spans : VisionSpans
        Where its vision tokens are.
    chain : Chain
        What is done at each stage.
    pruned_layers : sequence of int
        The decoder layers that can be pruned: those with full attention.
    layers : int
        Decoder layers of the model.
    rope_delta : Tensor, optional
        int64 [batch, 1]; what rotary positions are ahead of the number of tokens, in models with m-RoPE.
    own_bank : QueryBank, optional
        The bank that the engine has collected, for a method that asks for such a bank.
    features : mapping of str to sequence of Tensor, optional
        Image features of the prompt, to say why attention is not finite; None if unknown.
    rotations : callable, optional
        ``() -> mapping of int to Rotation``: rotary position embeddings by decoder layer, looked up where a method asks
        for them; None in an engine that does not know them.
    join_heads : callable
        ``LayerScores -> LayerScores``: the scores of all heads of a layer, where this process has some of them.
    round_up : callable
        ``(keep, score, scores) -> keep``, bool [batch, kv_heads, seq]: keep more than was selected, where memory is
        freed in blocks.
    narrows : bool
        Whether the engine takes placements that are not final.
    leaving : Leaving, optional
        What leaves before layers get it, in an engine that does that.
    """

    def __init__(
        self,
        spans: VisionSpans,
        chain: Chain,
        pruned_layers: Sequence[int],
        layers: int,
        *,
        rope_delta: Tensor | None = None,
        own_bank: QueryBank | None = None,
        features: Mapping[str, Sequence[Tensor]] | None = None,
        rotations: Callable[[], Mapping[int, Rotation]] | None = None,
        join_heads: Callable[[LayerScores], LayerScores] = _as_it_is,
        round_up: Callable[[Tensor, Tensor, LayerScores], Tensor] = _as_it_is,
        narrows: bool = False,
        leaving: Leaving | None = None,
    ) -> None:
        self.spans, self.chain = spans, chain
        self.pruned_layers, self.layers = list(pruned_layers), layers
        self._join_heads, self._round_up = join_heads, round_up
        self._unranked = UnrankedRows(spans, features)
        of_engine = rope_delta, rotations, own_bank
        self.kv = Scoring.of(spans, chain.kv.config, chain.kv.stage.evidence(chain.kv.config), *of_engine)
        self._prefill, self._attention = (
            self._scoring_of(link, of_engine) for link in (chain.prefill, chain.attention)
        )
        self.leaving = leaving
        self.attending = None if chain.attention is None else Attending(spans, chain.attention)
        self._coders = coders_of(chain.kv, own_bank)
        # What is to be coded has to be whole until it is placed.
        narrows = narrows and self._coders is None and chain.kv.config.tier_device is None
        self._bounded = chain.kv.stage.bounded(chain.kv.config) if narrows else None
        self._gammas: dict[int, list[float]] = {}
        self._held: dict[int, float] = {}  # by layer that was narrowed, the mean rate over its rows

    def read(self, attended: Attended) -> Iterator[LayerPlacement]:
        """Take in what a layer has attended to, and place the entries of the layers that can be decided now.

        Parameters
        ----------
        attended : Attended
            The layer with a chunk of the prompt, in the order of the layers and of the chunks.

        Yields
        ------
        LayerPlacement
            Nothing before the layer has read the whole prompt. Then this layer, or at the last layer all of them
            where the rates of each depend on the scores of all. Of those, each layer before the last drops already what
            none can keep, in placements that are not final, where engine and method allow it.

        Raises
        ------
        NonFiniteAttentionError
            If the attention of a layer is not finite in any row.
        ConfigError
            If the method gives a rate outside of [0, 1].
        """
        if not self.observe(attended):
            return
        self.let_leave(attended.layer)
        if self._waits_for_all and attended.layer != self.last_layer:
            yield from self.narrow()
            return
        link = self.chain.kv
        for scores, [allocation] in self.allocate(link, [link.config]):
            [placement] = self.select(link, scores, [(link.config, allocation)])
            score = fading_score(link, scores) if link.config.vision_budget is not None else None
            if scores.states is not None:
                scores.states.let_go()
            yield replace(self.place(scores, allocation, placement), score=score)
        self.kv.scores.clear()

    def narrow(self) -> Iterator[LayerPlacement]:
        """Drop what the layers scored so far cannot keep, whatever the later layers score.

        Yields
        ------
        LayerPlacement
            None of them final, of the layers of which it frees a part that is worth a copy.
        """
        if self._bounded is None:
            return
        link = replace(self.chain.kv, stage=self._bounded)
        for scores, [most] in self.allocate(link, [link.config]):
            rate = sum(row.rate for row in most) / len(most)
            if rate > (1 - WORTH_A_COPY) * self._held.get(scores.layer, 1.0):
                continue
            self._held[scores.layer] = rate
            [placement] = self.select(link, scores, [(link.config, most)])
            yield LayerPlacement(scores, most, placement, final=False)

    def observe(self, attended: Attended) -> bool:
        """Gather the queries of a chunk, and score the layer at the end of the prompt.

        Returns
        -------
        bool
            Whether the layer has read the whole prompt.
        """
        # What attention was to run among has been scored before it.
        scorings = [scoring for scoring in self._scorings(attended.layer) if attended.layer not in scoring.scores]
        for scoring in scorings:
            scoring.gather(attended)
        if attended.entries.length < self.spans.end:
            return False
        for scoring in scorings:
            self._score(scoring, attended)
        return True

    def attend(self, attended: Attended) -> Packing | None:
        """Say which tokens of a layer attend, before they do; None where they all do.

        Parameters
        ----------
        attended : Attended
            The layer with the whole prompt, before its attention.
        """
        if self.attending is None or attended.layer not in self.budget_layers(self.attending.link.config):
            return None
        scoring, layer = self._attention, attended.layer
        scoring.gather(attended)
        self._score(scoring, attended)
        unranked = self._unranked.set_aside(scoring, layer)
        packing = self.attending.choose(attended, scoring.scores[layer], unranked)
        if scoring is not self.kv:
            del scoring.scores[layer]
        return packing

    def let_leave(self, layer: int) -> None:
        """Let vision tokens leave at the prefill stage, once a layer is scored by which they are ranked."""
        if self.leaving is not None and layer in self.leaving.asked_layers:
            unranked = self._unranked.set_aside(self._prefill, layer)
            self.leaving.after(layer, self._prefill.scores[layer], unranked)

    def allocate(self, link: Link[KVStage], configs: Sequence[PLPHPConfig]) -> Iterator[Allocated]:
        """Layer level: how much each row of each scored layer keeps.

        Parameters
        ----------
        link : Link of KVStage
            Gives the rates.
        configs : sequence of PLPHPConfig
            Its settings, one or several that differ in how much is kept alone.

        Raises
        ------
        NonFiniteAttentionError, ConfigError
            See `read`.
        """
        unranked = {layer: self._unranked.set_aside(self.kv, layer) for layer in self.kv.scores}
        gammas = {layer: self._vision_score(layer) for layer in self.kv.scores}
        budget = self.budget_layers(configs[0])
        scored = [
            ScoredLayer(budget.index(layer), len(budget), gamma, self.kv.scores[layer])
            for layer, gamma in gammas.items()
            if layer in budget
        ]
        by_config = [_allocated(link, scored, config) for config in configs]
        for layer, gamma in gammas.items():
            exempt = [RowAllocation(score, "exempt", 1.0) for score in gamma]
            rows = [self._whole_where_needed(layers.get(layer, exempt), unranked[layer]) for layers in by_config]
            yield self.kv.scores[layer], rows

    def select(self, link: Link[KVStage], scores: LayerScores, allocated: Sequence[Budget]) -> list[Tensor]:
        """Head level: what becomes of the entries of each KV head of a layer, see `plphp.pruning.selecting`."""
        return placements(link, scores, allocated, self._round_up)

    def place(self, scores: LayerScores, allocation: Sequence[RowAllocation], placement: Tensor) -> LayerPlacement:
        """Put together what becomes of the entries of a layer, uint8 [batch, kv_heads, seq]."""
        coder = None if self._coders is None else self._coders(scores.layer)
        return LayerPlacement(scores, self._of_whole_prompt(scores.layer, allocation), placement, coder=coder)

    def budget_layers(self, config: PLPHPConfig) -> list[int]:
        """The layers that share the budget of a config: those that are pruned and not exempt."""
        exempt = {layer % self.layers for layer in config.exempt_layers}
        return [layer for layer in self.pruned_layers if layer not in exempt]

    @property
    def last_layer(self) -> int:
        """The last of the layers that can be pruned: the prompt has been read when it has."""
        return max(self.pruned_layers)

    @property
    def batch(self) -> int:
        """Rows of the prompt."""
        return self.spans.segment.shape[0]

    def repeat(self, times: int) -> None:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        self.spans = self.spans.repeated(times)
        self._unranked.repeat(times)
        self.kv.repeat(times)
        for part in (self.leaving, self.attending):
            if part is not None:
                part.repeat(times)
        for scoring in (self._prefill, self._attention):
            if scoring is not self.kv:
                scoring.repeat(times)

    def _scoring_of(self, link: Link[Any] | None, of_engine: tuple[Any, ...]) -> Scoring:
        """What a link before the KV stage asks of layers; the KV stage's own scoring where that asks the same."""
        if link is None:
            return self.kv
        asked = Scoring.of(self.spans, link.config, link.stage.evidence(link.config), *of_engine)
        return self.kv if asked.asks_as(self.kv) else asked

    def _score(self, scoring: Scoring, attended: Attended) -> None:
        """Score a layer that has read the whole prompt."""
        with as_written(attended.query.device):
            scoring.score(attended)
        scoring.scores[attended.layer] = self._join_heads(scoring.scores[attended.layer])

    @property
    def _waits_for_all(self) -> bool:
        return self.chain.kv.stage.needs_all_layers(self.chain.kv.config)

    def _vision_score(self, layer: int) -> list[float]:
        """The vision attention score of each row of a layer; where layers are narrowed, it is asked for many times."""
        if layer not in self._gammas:
            self._gammas[layer] = self.kv.scores[layer].vision_score().tolist()
        return self._gammas[layer]

    def _scorings(self, layer: int) -> list[Scoring]:
        """What is asked of a layer: by the KV stage of every layer, by the prefill stage of some."""
        own = self._prefill is not self.kv and self.leaving is not None and layer in self.leaving.asked_layers
        return [self.kv, self._prefill] if own else [self.kv]

    def _whole_where_needed(self, rows: Sequence[RowAllocation], unranked: Sequence[int]) -> list[RowAllocation]:
        """Keep rows whole that have no vision token, or cannot be ranked."""
        has_vision = self.spans.vision.any(1).tolist()
        kept = [row if has_vision[number] else RowAllocation(0.0, "no-vision", 1.0) for number, row in enumerate(rows)]
        for number in unranked:
            kept[number] = RowAllocation(0.0, "non-finite", 1.0)
        return kept

    def _of_whole_prompt(self, layer: int, rows: Sequence[RowAllocation]) -> list[RowAllocation]:
        """Rates as fractions of all vision tokens of the prompt, where some have left before the layer."""
        if self.leaving is None:
            return list(rows)
        shares = [self.leaving.share_at(layer, number) for number in range(len(rows))]
        return [
            row if row.layer_class == "no-vision" else replace(row, rate=row.rate * share)
            for row, share in zip(rows, shares, strict=True)
        ]


def _allocated(
    link: Link[KVStage], scored: Sequence[ScoredLayer], config: PLPHPConfig
) -> dict[int, list[RowAllocation]]:
    """The rates of the layers that share a budget, by their numbers."""
    layers = link.stage.allocate(scored, config) if scored else []
    rates = [row.rate for rows in layers for row in rows]
    if not all(0 <= rate <= 1 for rate in rates):
        raise ConfigError(f"the method {link.method!r} gave retention rates outside of [0, 1]: {rates}")
    return {layer.scores.layer: rows for layer, rows in zip(scored, layers, strict=True)}
