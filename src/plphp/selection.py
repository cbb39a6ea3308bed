# SPDX-License-Identifier: Apache-2.0
"""Head level: from scores and retention rates to the entries each KV head keeps. Pure functions.

A *ranker* gives every entry of every KV head a score; `keep_mask` keeps the best of them, or with a `Mix` the best
of them beside others that do not go by rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocation import kept_count
from .config import PLPHPConfig
from .types import LayerScores

Ranker = Callable[[LayerScores, PLPHPConfig], Tensor]


@dataclass(frozen=True)
class Mix:
    """Which part of each head's places goes by something else than rank.

    Parameters
    ----------
    random : float
        Fraction of the places that is drawn at random from what the ranking leaves.
    spread : float
        Fraction of the places that is spread evenly, in prompt order, over what is left then.
    """

    random: float = 0.0
    spread: float = 0.0


RANKED = Mix()


def combined(values: Tensor, kv_heads: int, config: PLPHPConfig) -> Tensor:
    """Combine the query heads of each KV head: [batch, q_heads, seq] to [batch, kv_heads, seq]."""
    grouped = values.unflatten(1, (kv_heads, -1))
    return grouped.amax(2) if config.gqa_reduction == "max" else grouped.mean(2)


def per_head(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head ranks by the attention of its own query heads (head-level pruning of arXiv:2502.14504).

    Returns
    -------
    Tensor
        float32 [batch, kv_heads, seq].
    """
    return combined(scores.attention, scores.kv_heads, config)


def shared_by_heads(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """One ranking for all KV heads, the mean over all query heads: the ablation without the head level."""
    return scores.attention.mean(1, keepdim=True).expand(-1, scores.kv_heads, -1)


def by_peak(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head ranks by the most attention that any query row gives."""
    return combined(scores.need("peak"), scores.kv_heads, config)


def by_best_rank(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head ranks by the best place that any query row gives, in (0, 1].

    Entries with the same best place, one for each query row, are told apart by their mean attention.
    """
    mean = per_head(scores, config).masked_fill(~scores.vision[:, None], 0)
    share = mean / mean.amax(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    return 1 / (2 + scores.need("best_rank") - share)


def by_value_norm(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head ranks by the norm of its values."""
    return scores.need("value_norm")


def at_random(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """A random ranking per layer and KV head.

    It depends on the seed, the layer and the number of vision tokens of a row, not on the other rows of the
    batch or on padding.
    """
    rank = torch.zeros(scores.attention.shape[0], scores.kv_heads, scores.attention.shape[2])
    for row, vision in enumerate(scores.vision.cpu()):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + scores.layer) % 2**63)
        rank[row, :, vision] = torch.rand(scores.kv_heads, int(vision.sum()), generator=generator)
    return rank.to(scores.attention.device)


def pooled(rank: Tensor, scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Average a ranking [batch, kv_heads, seq] over ``score_pool`` neighbouring vision tokens of the same image.

    At the ends of an image the neighbours that exist count.
    """
    if config.score_pool == 1:
        return rank
    rank = rank.clone()
    for row, segment in enumerate(scores.segment):
        for image in range(int(segment.max()) + 1):
            positions = (segment == image).nonzero()[:, 0]
            if len(positions):
                rank[row][:, positions] = torch.nn.functional.avg_pool1d(
                    rank[row][:, positions],
                    config.score_pool,
                    stride=1,
                    padding=config.score_pool // 2,
                    count_include_pad=False,
                )
    return rank


def keep_mask(
    rank: Tensor, scores: LayerScores, rates: Sequence[float], config: PLPHPConfig, mix: Mix = RANKED
) -> Tensor:
    """Decide what each KV head keeps: all that is no candidate, no padding, and its best-ranked candidates.

    As many entries are evicted as at the same rate with the vision tokens as candidates, whatever they are. Of two
    candidates with the same rank the earlier one is kept.

    Parameters
    ----------
    rank : Tensor
        float [batch, kv_heads, seq], higher is better.
    scores : LayerScores
        Gives the images, the candidates and the padding.
    rates : sequence of float
        Retention rate of each row.
    config : PLPHPConfig
        ``image_quota`` and ``min_kept``; ``seed`` for a mix with a random part.
    mix : Mix
        Part of the places that does not go by rank.

    Returns
    -------
    Tensor
        bool [batch, kv_heads, seq].
    """
    candidates = scores.candidates
    keep = (scores.real & ~candidates)[:, None].expand(-1, rank.shape[1], -1).clone()
    drawn = at_random(scores, config) if mix.random else rank
    for row, rate in enumerate(rates):
        segment = scores.segment[row]
        if config.image_quota == "per_image":
            groups = [(segment == image).nonzero()[:, 0] for image in range(int(segment.max()) + 1)]
            tokens = [len(positions) for positions in groups]
        else:
            groups, tokens = [candidates[row].nonzero()[:, 0]], [int((segment >= 0).sum())]
        for positions, vision in zip(groups, tokens, strict=True):
            evicted = vision - kept_count(rate, vision, config.min_kept)
            chosen = _choose(rank[row][:, positions], drawn[row][:, positions], len(positions) - evicted, mix)
            keep[row][:, positions] = chosen
    return keep


def _choose(rank: Tensor, drawn: Tensor, count: int, mix: Mix) -> Tensor:
    """Choose ``count`` of the entries of each head, bool [kv_heads, entries]: first by rank, then at random, then
    evenly spread."""
    keep = torch.zeros_like(rank, dtype=torch.bool)
    at_random, spread = (math.floor(part * count + 0.5) for part in (mix.random, mix.spread))
    ranked = max(0, count - at_random - spread)
    at_random = min(at_random, max(0, count - ranked))
    keep.scatter_(1, _best(rank, ranked), True)
    if at_random:
        keep.scatter_(1, _best(drawn.masked_fill(keep, -torch.inf), at_random), True)
    left, wanted = rank.shape[1] - ranked - at_random, count - ranked - at_random
    if wanted > 0:
        place = (~keep).cumsum(1)  # 1 to left, over the entries that are left
        keep |= ~keep & (place * wanted // left > (place - 1) * wanted // left)
    return keep


def _best(rank: Tensor, count: int) -> Tensor:
    return rank.sort(dim=-1, descending=True, stable=True).indices[:, : max(0, count)]
