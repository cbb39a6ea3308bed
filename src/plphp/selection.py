# SPDX-License-Identifier: Apache-2.0
"""Head level: from scores and retention rates to the entries each KV head keeps. Pure functions.

A *ranker* gives every entry of every KV head a score; `keep_mask` keeps the best of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .allocation import kept_count
from .config import PLPHPConfig
from .types import LayerScores

Ranker = Callable[[LayerScores, PLPHPConfig], Tensor]


def per_head(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head ranks by the attention of its own query heads (head-level pruning of arXiv:2502.14504).

    Returns
    -------
    Tensor
        float32 [batch, kv_heads, seq].
    """
    grouped = scores.attention.unflatten(1, (scores.kv_heads, -1))
    return grouped.amax(2) if config.gqa_reduction == "max" else grouped.mean(2)


def shared_by_heads(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """One ranking for all KV heads, the mean over all query heads: the ablation without the head level."""
    return scores.attention.mean(1, keepdim=True).expand(-1, scores.kv_heads, -1)


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


def keep_mask(rank: Tensor, scores: LayerScores, rates: Sequence[float], config: PLPHPConfig) -> Tensor:
    """Decide what each KV head keeps: all text, no padding, and its best-ranked vision tokens.

    Of two vision tokens with the same rank the earlier one is kept.

    Parameters
    ----------
    rank : Tensor
        float [batch, kv_heads, seq], higher is better.
    scores : LayerScores
        Gives the images and the padding.
    rates : sequence of float
        Retention rate of each row.
    config : PLPHPConfig
        ``image_quota`` and ``min_kept``.

    Returns
    -------
    Tensor
        bool [batch, kv_heads, seq].
    """
    text = scores.real & ~scores.vision
    keep = text[:, None].expand(-1, rank.shape[1], -1).clone()
    for row, rate in enumerate(rates):
        segment = scores.segment[row]
        if config.image_quota == "per_image":
            groups = [(segment == image).nonzero()[:, 0] for image in range(int(segment.max()) + 1)]
        else:
            groups = [(segment >= 0).nonzero()[:, 0]]
        for positions in groups:
            count = kept_count(rate, len(positions), config.min_kept)
            order = rank[row][:, positions].sort(dim=-1, descending=True, stable=True).indices
            keep[row].scatter_(1, positions[order[:, :count]], True)
    return keep
