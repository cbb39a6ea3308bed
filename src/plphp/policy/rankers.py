# SPDX-License-Identifier: Apache-2.0
"""Rankers: a score for every entry of every KV head, however many are to be kept. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from plphp.settings.config import PLPHPConfig

from .evidence import LayerScores

if TYPE_CHECKING:
    from torch import Tensor


Ranker: TypeAlias = "Callable[[LayerScores, PLPHPConfig], Tensor]"
"""The head level: of a layer's scores, how much each KV head wants each entry; float32 [batch, kv_heads, seq]."""


def combined(values: Tensor, kv_heads: int, config: PLPHPConfig) -> Tensor:
    """Combine the query heads of each KV head: [batch, q_heads, seq] to [batch, kv_heads, seq]."""
    grouped = values.unflatten(1, (kv_heads, -1))
    return grouped.amax(2) if config.gqa_reduction == "max" else grouped.mean(2)


def per_head(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head scores by the attention of its own query heads (head-level pruning of arXiv:2502.14504).

    Returns
    -------
    Tensor
        float32 [batch, kv_heads, seq].
    """
    return combined(scores.attention, scores.kv_heads, config)


def shared_by_heads(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """One score for all KV heads, the mean over all query heads: the ablation without the head level."""
    return scores.attention.mean(1, keepdim=True).expand(-1, scores.kv_heads, -1)


def by_peak(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head scores by the most attention that any query row gives."""
    return combined(scores.need("peak"), scores.kv_heads, config)


def by_best_position(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head scores by the best position that any query row gives, in (0, 1].

    Each query row has an entry of its own at every position; entries of equal position go by their mean attention.
    """
    return _best_first(scores.need("best_position"), per_head(scores, config), scores)


def shared_best_position(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """One score for all KV heads: the best position that any query row gives in any of them, in (0, 1].

    Entries of equal position go by their mean attention over query rows and heads.

    Returns
    -------
    Tensor
        float32 [batch, 1, seq].
    """
    best = scores.need("best_position").amin(1, keepdim=True)
    return _best_first(best, scores.attention.mean(1, keepdim=True), scores)


def _best_first(best: Tensor, mean: Tensor, scores: LayerScores) -> Tensor:
    """Scores in the order of best positions, and among equals in that of the mean attention to the candidates."""
    import torch

    mean = mean.masked_fill(~scores.candidates[:, None], 0)
    share = mean / mean.amax(-1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
    return 1 / (2 + best - share)


def by_value_norm(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Each KV head scores by the norm of its values."""
    return scores.need("value_norm")


def times_value_norm(score: Tensor, scores: LayerScores) -> Tensor:
    """Weigh a score [batch, kv_heads, seq] by the norm of the values, where the method asks for it."""
    return score if scores.value_norm is None else score * scores.value_norm


def at_random(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """A random score per layer and KV head.

    It depends on the seed, the layer and the number of vision tokens of a row, not on the other rows of the
    batch or on padding.
    """
    import torch

    shape = scores.attention.shape[0], scores.kv_heads, scores.attention.shape[2]
    score = torch.zeros(shape, dtype=torch.float32)
    for row, vision in enumerate(scores.vision.cpu()):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + scores.layer) % 2**63)
        score[row, :, vision] = torch.rand(scores.kv_heads, int(vision.sum()), generator=generator, dtype=torch.float32)
    return score.to(scores.attention.device)


def pooled(score: Tensor, scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Average a score [batch, kv_heads, seq] over ``score_pool`` neighbouring vision tokens of the same image.

    At the ends of an image the neighbours that exist count.
    """
    if config.score_pool == 1:
        return score
    from torch.nn.functional import avg_pool1d

    score = score.clone()
    for row, segment in enumerate(scores.segment):
        for image in range(int(segment.max()) + 1):
            positions = (segment == image).nonzero()[:, 0]
            if len(positions):
                score[row][:, positions] = avg_pool1d(
                    score[row][:, positions],
                    config.score_pool,
                    stride=1,
                    padding=config.score_pool // 2,
                    count_include_pad=False,
                )
    return score
