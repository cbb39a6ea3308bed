# SPDX-License-Identifier: Apache-2.0
"""The stages at which vision tokens leave, in the order in which a prompt passes them.

- *encoder*: before the text model. No layer of it ever sees the token.
- *prefill*: inside the text model, from a decoder layer on. The layers before hold the token, the later ones do not.
- *attention*: out of the attention of single layers, while they read the prompt. All layers compute all tokens.
- *kv*: from the KV cache, once a layer has read the whole prompt, per layer and per KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

from plphp.errors import ConfigError
from plphp.settings.config import PLPHPConfig

from .allocation import Allocator
from .evidence import Evidence, LayerScores
from .image_tokens import Chosen, ImageTokens, TowerEvidence
from .rankers import Ranker
from .selection import RANKED, Mix

if TYPE_CHECKING:
    from torch import Tensor

STAGES = ("encoder", "prefill", "attention", "kv")
"""Names of the stages, in the order in which a prompt passes them."""


def rungs_of_ladder(config: PLPHPConfig) -> tuple[str, ...] | None:
    """Names of the rungs of the ladder that a config names, if any."""
    return None if config.ladder is None else config.ladder.names


@dataclass(frozen=True)
class EncoderStage:
    """Vision tokens leave before the text model.

    Parameters
    ----------
    choose : callable
        ``(image, config) -> Chosen``: the vision tokens of an image that stay, and what becomes of their features.
    rate : callable
        ``config -> float``: retention rate, in [0, 1].
    tower : callable
        ``config -> TowerEvidence or None``: what it wants to know of the vision tower.
    needs_grid : callable
        ``config -> bool``: whether it works on rows and columns of tokens; a prompt with an image whose tokens form no
        plain grid is refused before it is read.
    draws : bool
        Whether it draws at random, by `PLPHPConfig.seed`.
    """

    choose: Callable[[ImageTokens, PLPHPConfig], Chosen]
    rate: Callable[[PLPHPConfig], float] = lambda config: config.base_rate
    tower: Callable[[PLPHPConfig], TowerEvidence | None] = lambda config: None
    needs_grid: Callable[[PLPHPConfig], bool] = lambda config: False
    draws: bool = False


@dataclass(frozen=True)
class PrefillStage:
    """Vision tokens leave inside prefill: the layers from some on do not get them.

    Parameters
    ----------
    rates : callable
        ``(config, layers) -> mapping of int to float``: by the decoder layers, from 1 to ``layers``, before which
        tokens leave, the retention rate from there on, of the vision tokens that came to the text model.
    kept_tokens : callable
        ``(scores, rates, config) -> bool [batch, seq]``: the vision tokens that stay. ``scores`` are those of the layer
        before (of the last before with full attention) with the tokens that it has; ``rates`` say for each row of the
        batch which share of them is to stay.
    evidence : callable
        ``config -> Evidence``: what it wants to know of those layers beside the mean attention.
    """

    rates: Callable[[PLPHPConfig, int], Mapping[int, float]]
    kept_tokens: Callable[[LayerScores, Sequence[float], PLPHPConfig], Tensor]
    evidence: Callable[[PLPHPConfig], Evidence] = lambda config: Evidence()


@dataclass(frozen=True)
class AttentionStage:
    """While a layer reads the prompt, attention runs among its important tokens alone.

    The queries, keys and values of the vision tokens that are not important take no part, and the attention of these
    tokens is 0 in this layer; they stay in the residual stream, so that all that is no attention is computed for them.
    Text is always important, and so is the last token of the prompt.

    Parameters
    ----------
    important : callable
        ``(scores, config) -> bool [batch, seq]``: the important vision tokens of a layer. ``scores`` are those of this
        layer, by the attention that it would have among all tokens.
    evidence : callable
        ``config -> Evidence``: what it wants to know of the layer beside the mean attention.
    acts : callable
        ``config -> bool``: whether it is asked for at all. Without it the attention of prefill is that of the model.
    """

    important: Callable[[LayerScores, PLPHPConfig], Tensor]
    evidence: Callable[[PLPHPConfig], Evidence] = lambda config: Evidence()
    acts: Callable[[PLPHPConfig], bool] = lambda config: True


@dataclass(frozen=True)
class KVStage:
    """Entries leave the KV cache, once a layer has read the prompt: an allocator and a ranker decide which.

    ``score``, ``evidence`` and ``mix`` must not look at how much is to be kept (rates and thresholds): that is the
    allocator's part, so that several rates can be chosen by the same scores (`plphp.branch`).

    Parameters
    ----------
    allocate : Allocator
        Layer level: scored layers to retention rates, see `plphp.policy.allocation`.
    score : Ranker
        Head level: a score for every entry of every KV head, higher is better, see `plphp.policy.rankers`.
    evidence : callable
        ``config -> Evidence``: what it wants to know of a layer beside the mean attention.
    mix : callable
        ``config -> Mix``: which part of the entries that a head keeps does not go by score.
    uses_class_rule : callable
        ``config -> bool``: whether the allocator sorts layers into classes by their vision attention scores. Then
        ``target_retention``, or a ladder, says how much is kept, and the rate of none is known before all have been
        scored.
    all_layers : callable
        ``config -> bool``: whether the rates of any layer depend on the scores of all, for another reason than
        ``uses_class_rule``.
    at_most : Allocator, optional
        For methods whose rates depend on the scores of all layers: from the first layers of a prompt, the most that
        each of them can keep, whatever the later layers score. What exceeds it leaves before the last layer is scored.
        None where nothing is known, so that all layers are held in full until then.
    needs_answer : bool
        Whether it scores by the queries of the answer, which only `plphp.branch` has.
    heads : {"equal", "ragged"}
        Its own budgets over the KV heads of a layer, for a config that leaves ``heads`` open, see
        `plphp.policy.selection.keep_masks`.
    heads_compare : bool
        Whether the scores of different KV heads can be compared; otherwise heads keep as many entries each, and
        ``heads="ragged"`` is refused.
    rungs : callable
        ``config -> tuple of str or None``: the rungs that a layer holds its vision entries in, the best in the first;
        None where entries are held whole or dropped. Where they are not those of the config's ladder, the allocator
        says by `RowAllocation.shares` how much each of them holds.
    fading_score : Ranker, optional
        By which entries fade under a ``vision_budget``, to be compared between heads; for methods whose ``score`` says
        nothing of entries. Default: ``score``.
    """

    allocate: Allocator
    score: Ranker
    evidence: Callable[[PLPHPConfig], Evidence] = lambda config: Evidence()
    mix: Callable[[PLPHPConfig], Mix] = lambda config: Mix()
    uses_class_rule: Callable[[PLPHPConfig], bool] = lambda config: False
    all_layers: Callable[[PLPHPConfig], bool] = lambda config: False
    at_most: Allocator | None = None
    needs_answer: bool = False
    heads: Literal["equal", "ragged"] = "equal"
    heads_compare: bool = True
    rungs: Callable[[PLPHPConfig], tuple[str, ...] | None] = rungs_of_ladder
    fading_score: Ranker | None = None

    def ragged(self, config: PLPHPConfig) -> bool:
        """Whether the KV heads of a layer compete for its places."""
        return (config.heads or self.heads) == "ragged"

    def fades_ragged(self, config: PLPHPConfig) -> bool:
        """Whether the KV heads of a layer compete for what is held of old images."""
        return self.ragged(config) or (self.fading_score is not None and config.heads is None)

    def scored(self, scores: LayerScores, config: PLPHPConfig) -> Tensor:
        """The score of every entry of every KV head, float [batch, kv_heads, seq].

        Raises
        ------
        ConfigError
            If the ranker gives something of another shape.
        """
        score = self.score(scores, config)
        batch, _, seq = scores.attention.shape
        if tuple(score.shape) != (batch, scores.kv_heads, seq):
            raise ConfigError(
                f"The ranker of the method {config.method!r} has to give [batch, kv_heads, seq] scores, here "
                f"{[batch, scores.kv_heads, seq]}, got {list(score.shape)}."
            )
        return score

    def needs_all_layers(self, config: PLPHPConfig) -> bool:
        """Whether the rates of any layer depend on the scores of all."""
        return (config.sorts_by_order and self.uses_class_rule(config)) or self.all_layers(config)

    def bounded(self, config: PLPHPConfig) -> KVStage | None:
        """The stage with upper bounds in the place of rates, where what it selects by them holds all that it selects in
        the end; None where that is not known: without ``at_most``, or where a part does not go by score; and where
        scores are worked out of keys and values, which a layer must hold until it is placed."""
        if self.at_most is None or self.mix(config) != RANKED or self.evidence(config).states is not None:
            return None
        return replace(self, allocate=self.at_most)


Stage: TypeAlias = EncoderStage | PrefillStage | AttentionStage | KVStage
