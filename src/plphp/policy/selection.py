# SPDX-License-Identifier: Apache-2.0
"""Head level: from scores and retention rates to the entries each KV head keeps. Pure functions.

A *ranker* (`plphp.policy.rankers`) gives every entry of every KV head a score; `keep_mask` keeps the best of them, or
with a `Mix` the best of them beside others that do not go by score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plphp.settings.config import PLPHPConfig

from .allocation import kept_count
from .evidence import LayerScores
from .rankers import at_random

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """Which part of what a head keeps goes by something else than score.

    Parameters
    ----------
    random : float
        Fraction of it that is drawn at random from what the scores leave.
    spread : float
        Fraction of it that is spread evenly, in prompt order, over what is left then.
    """

    random: float = 0.0
    spread: float = 0.0


RANKED = Mix()


def keep_mask(
    score: Tensor, scores: LayerScores, rates: Sequence[float], config: PLPHPConfig, mix: Mix = RANKED
) -> Tensor:
    """Decide what each KV head keeps: all that is no candidate, no padding, and its best-scored candidates.

    As many entries are evicted as at the same rate with the vision tokens as candidates, whatever they are. Of two
    candidates with equal scores the earlier is kept.

    Parameters
    ----------
    score : Tensor
        float [batch, kv_heads, seq], higher is better.
    scores : LayerScores
        Gives the images, the candidates and the padding.
    rates : sequence of float
        Retention rate of each row.
    config : PLPHPConfig
        ``image_quota`` and ``min_kept``; ``seed`` for a mix with a random part.
    mix : Mix
        Part of what is kept that does not go by score.

    Returns
    -------
    Tensor
        bool [batch, kv_heads, seq].
    """
    return keep_masks(score, scores, [rates], config, mix)[0]


def keep_masks(
    score: Tensor, scores: LayerScores, rates: Sequence[Sequence[float]], config: PLPHPConfig, mix: Mix = RANKED
) -> Tensor:
    """Decide for several lists of rates, which share the work of sorting, see `keep_mask`.

    Returns
    -------
    Tensor
        bool [lists, batch, kv_heads, seq].
    """
    candidates = scores.candidates
    keep = (scores.valid & ~candidates)[:, None].repeat(len(rates), 1, score.shape[1], 1)
    drawn = at_random(scores, config) if mix.random else score
    for row, segment in enumerate(scores.segment):
        if config.image_quota == "per_image":
            groups = [(segment == image).nonzero()[:, 0] for image in range(int(segment.max()) + 1)]
            tokens = [len(positions) for positions in groups]
        else:
            groups, tokens = [candidates[row].nonzero()[:, 0]], [int((segment >= 0).sum())]
        for positions, vision in zip(groups, tokens, strict=True):
            kept = [kept_count(row_rates[row], vision, config.min_kept) for row_rates in rates]
            counts = [max(0, len(positions) - vision + count) for count in kept]
            keep[:, row][:, :, positions] = _choose(score[row][:, positions], drawn[row][:, positions], counts, mix)
    return keep


def _choose(score: Tensor, drawn: Tensor, counts: Sequence[int], mix: Mix) -> Tensor:
    """Choose each of some numbers of the entries of each head, bool [counts, kv_heads, entries]: first by score, then
    at random, then evenly spread."""
    import torch

    from plphp.kernels.ordering import positions_in_order

    def column(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=score.device)[:, None, None]

    at_random, spread = ([math.floor(part * count + 0.5) for count in counts] for part in (mix.random, mix.spread))
    ranked = [max(0, count - a - b) for count, a, b in zip(counts, at_random, spread, strict=True)]
    at_random = [min(a, count - best) for count, a, best in zip(counts, at_random, ranked, strict=True)]
    keep = positions_in_order(score) < column(ranked)
    if any(at_random):
        keep |= positions_in_order(torch.where(keep, -torch.inf, drawn)) < column(at_random)
    done = [a + b for a, b in zip(ranked, at_random, strict=True)]
    if done != list(counts):
        left, missing = column([max(1, score.shape[1] - n) for n in done]), column(counts) - column(done)
        index = (~keep).cumsum(-1)  # 1 to left, over the entries that are left
        keep |= ~keep & (index * missing // left > (index - 1) * missing // left)
    return keep
