# SPDX-License-Identifier: Apache-2.0
"""Head level: from scores and retention rates to the entries each KV head keeps. Pure functions.

A *ranker* (`plphp.policy.rankers`) gives every entry of every KV head a score; `keep_mask` keeps the best of them, or
with a `Mix` the best of them beside others that do not go by score.
"""

from __future__ import annotations

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
    score: Tensor,
    scores: LayerScores,
    rates: Sequence[float],
    config: PLPHPConfig,
    mix: Mix = RANKED,
    *,
    ragged: bool = False,
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
        ``image_quota``, ``min_kept`` and ``head_safeguard``; ``seed`` for a mix with a random part.
    mix : Mix
        Part of what is kept that does not go by score.
    ragged : bool
        Whether the heads compete for the places of the layer (AdaKV, arXiv:2407.11550, Algorithm 1): of k places a
        head ``floor(head_safeguard * k)`` go to its own best candidates, at least ``min_kept``, and all that are left
        to the best of the remaining candidates of all heads. Otherwise each head keeps k.

    Returns
    -------
    Tensor
        bool [batch, kv_heads, seq].
    """
    return keep_masks(score, scores, [rates], config, mix, ragged=ragged)[0]


def keep_masks(
    score: Tensor,
    scores: LayerScores,
    rates: Sequence[Sequence[float]],
    config: PLPHPConfig,
    mix: Mix = RANKED,
    *,
    ragged: bool = False,
) -> Tensor:
    """Decide for several lists of rates, which share the work of sorting, see `keep_mask`.

    Returns
    -------
    Tensor
        bool [lists, batch, kv_heads, seq].
    """
    import torch

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
            equal = [max(0, len(positions) - vision + count) for count in kept]
            own = score[row][:, positions]
            counts = torch.tensor(equal, device=score.device)[:, None].expand(-1, len(own))
            if ragged:
                safe = [min(count, max(config.min_kept, int(config.head_safeguard * count))) for count in equal]
                counts = ragged_counts(own, equal, safe)
            keep[:, row][:, :, positions] = _choose(own, drawn[row][:, positions], counts, mix)
    return keep


def ragged_counts(score: Tensor, equal: Sequence[int], safe: Sequence[int]) -> Tensor:
    """How many candidates each head keeps, where the heads of a layer compete for its places.

    More places never take a candidate away: what is kept of a smaller number is kept of a larger.

    Parameters
    ----------
    score : Tensor
        float [kv_heads, candidates], higher is better, to be compared between heads.
    equal : sequence of int
        For each of some numbers, what each head would keep were all heads alike: the places are as many times the
        heads.
    safe : sequence of int
        For each of them, how many of its best candidates a head keeps in any case; at most as many.

    Returns
    -------
    Tensor
        int64 [numbers, kv_heads].
    """
    import torch

    from plphp.kernels.ordering import falling_order, positions_in_order

    heads = len(score)
    # Of equal scores the earlier entry comes first, and of one entry the first head.
    order = falling_order(score.T.flatten())
    head, position = order % heads, positions_in_order(score).T.flatten()[order]
    counts = []
    for each, reserved in zip(equal, safe, strict=True):
        open_to_all = head[position >= reserved][: heads * (each - reserved)]
        counts.append(reserved + torch.bincount(open_to_all, minlength=heads))
    return torch.stack(counts)


def _choose(score: Tensor, drawn: Tensor, counts: Tensor, mix: Mix) -> Tensor:
    """Choose some numbers of the entries of each head: first by score, then at random, then evenly spread.

    Parameters
    ----------
    score, drawn : Tensor
        float [kv_heads, entries].
    counts : Tensor
        int64 [numbers, kv_heads].
    mix : Mix
        The parts that do not go by score.

    Returns
    -------
    Tensor
        bool [numbers, kv_heads, entries].
    """
    import torch

    from plphp.kernels.ordering import positions_in_order

    counts = counts[..., None]
    if mix == RANKED:
        return positions_in_order(score) < counts
    at_random, spread = ((part * counts.double() + 0.5).floor().long() for part in (mix.random, mix.spread))
    ranked = (counts - at_random - spread).clamp(min=0)
    at_random = torch.minimum(at_random, counts - ranked)
    keep = positions_in_order(score) < ranked
    keep |= positions_in_order(torch.where(keep, -torch.inf, drawn)) < at_random
    missing, left = counts - ranked - at_random, (score.shape[1] - ranked - at_random).clamp(min=1)
    index = (~keep).cumsum(-1)  # 1 to left, over the entries that are left
    return keep | (~keep & (index * missing // left > (index - 1) * missing // left))
