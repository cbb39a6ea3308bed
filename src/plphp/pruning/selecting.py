# SPDX-License-Identifier: Apache-2.0
"""Head level: from scores and the rates of rows to what becomes of every entry of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from plphp.policy.allocation import RowAllocation
from plphp.policy.chain import Link
from plphp.policy.evidence import LayerScores
from plphp.policy.rankers import pooled
from plphp.policy.selection import keep_masks
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig

from .placement import by_rungs, whole_or_dropped

NOT_PRUNED = ("exempt", "no-vision", "non-finite")
"""Classes of rows that are held as they are."""
Budget: TypeAlias = tuple[PLPHPConfig, Sequence[RowAllocation]]
"""A config, and what the layer level decided for each row by it."""
RoundUp: TypeAlias = Callable[[Tensor, Tensor, LayerScores], Tensor]
"""Keeps more than was selected, see `plphp.pruning.reading.PromptReading`."""


def fading_score(link: Link[KVStage], scores: LayerScores) -> Tensor:
    """The score by which entries of a layer fade later, float [batch, kv_heads, seq]."""
    ranker = link.stage.fading_score
    score = link.stage.scored(scores, link.config) if ranker is None else ranker(scores, link.config)
    return pooled(score, scores, link.config)


def placements(link: Link[KVStage], scores: LayerScores, budgets: Sequence[Budget], round_up: RoundUp) -> list[Tensor]:
    """What becomes of the entries of a layer, by several configs that share its scores.

    Parameters
    ----------
    link : Link of KVStage
        Gives the scores, by its own config.
    scores : LayerScores
        Of the layer.
    budgets : sequence of Budget
        Their configs differ from the link's in how much is held, and in how, alone.
    round_up : callable
        Applied to what is kept.

    Returns
    -------
    list of Tensor
        For each config, uint8 [batch, kv_heads, seq], see `plphp.pruning.placement.Placement`.
    """
    own = link.config
    score = pooled(link.stage.scored(scores, own), scores, own)
    rates = [_cumulative_rates(link.stage, config, rows) for config, rows in budgets]
    mix, ragged = link.stage.mix(own), link.stage.ragged(own)
    kept = keep_masks(score, scores, [row for part in rates for row in part], own, mix, ragged=ragged)
    masks = iter(round_up(mask, score, scores) for mask in kept)
    placed = []
    for (config, rows), part in zip(budgets, rates, strict=True):
        held = [next(masks) for _ in part]
        rungs = link.stage.rungs(config)
        if rungs is None:
            placed.append(whole_or_dropped(held[0]))
        else:
            whole = [number for number, row in enumerate(rows) if row.layer_class in NOT_PRUNED]
            placed.append(by_rungs(rungs, held, scores, whole))
    return placed


def _cumulative_rates(stage: KVStage, config: PLPHPConfig, rows: Sequence[RowAllocation]) -> list[list[float]]:
    """For each rung, or for all that is kept whole, the rate of each row down to it."""
    rungs = stage.rungs(config)
    if rungs is None:
        return [[row.rate for row in rows]]
    return [list(rates) for rates in zip(*(_of_rungs(row, config, len(rungs)) for row in rows), strict=True)]


def _of_rungs(row: RowAllocation, config: PLPHPConfig, rungs: int) -> Sequence[float]:
    if row.shares is not None:
        return row.shares
    # A row that is held as it is, where the rungs are the method's own, has all in the best.
    return [row.rate] * rungs if config.ladder is None else config.ladder.cumulative(row.rate)
