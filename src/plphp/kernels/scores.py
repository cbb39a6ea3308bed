# SPDX-License-Identifier: Apache-2.0
"""Attention of the prompt's last queries over all keys, without a seq x seq matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.policy.evidence import PLAIN, Evidence

from . import choice
from .packed import PackedKV
from .precision import as_written

KEYS_AT_ONCE = 2048
"""Keys that are held in float32 at once."""
MASS_AT_ONCE = 2**18
"""Attention weights of as many query rows as stay below are worked out at once."""


@dataclass
class WindowScores:
    """What some query rows say about every entry; see `plphp.policy.evidence.LayerScores` for what each tensor is.

    Parameters
    ----------
    attention : Tensor
        float32 [batch, q_heads, seq].
    peak : Tensor, optional
        float32 [batch, q_heads, seq].
    best_rank : Tensor, optional
        int64 [batch, kv_heads, seq].
    density : Tensor, optional
        float32 [batch, q_heads].
    """

    attention: Tensor
    peak: Tensor | None = None
    best_rank: Tensor | None = None
    density: Tensor | None = None


def window_scores(
    query: Tensor,
    weight: Tensor,
    position: Tensor,
    keys: Tensor,
    real: Tensor,
    prefix: PackedKV | None,
    scaling: float,
    *,
    evidence: Evidence = PLAIN,
    vision: Tensor | None = None,
    gqa_reduction: str = "mean",
) -> WindowScores:
    """Softmax mass that a few query rows give to every entry of the tail, over prefix and tail together.

    On a CUDA device a Triton kernel does it, where it can and does it right, and nothing beside the mean is asked for.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, window, dim]; post-RoPE queries, in a dtype that may differ from that of the keys.
    weight : Tensor
        float [batch, window]; share of each query in the mean of its row, 0 where it does not count.
    position : Tensor
        int64 [window]; index of each query in the tail. It sees the tail up to there.
    keys : Tensor
        [batch, kv_heads, seq, dim]; post-RoPE keys of the tail.
    real : Tensor
        bool [batch, seq]; False on padding, which nobody sees.
    prefix : PackedKV, optional
        Kept entries of earlier turns, seen by every query.
    scaling : float
        Factor on the logits.
    evidence : Evidence
        What to work out beside the mean.
    vision : Tensor, optional
        bool [batch, seq]; the entries that are ranked for ``best_rank``.
    gqa_reduction : {"mean", "max"}
        How the query heads of a KV head are combined for ``best_rank``.

    Returns
    -------
    WindowScores
        Computed in float32, under autocast too. NaN where a query or a visible key is NaN.
    """
    if not (evidence.peak or evidence.best_rank or evidence.density is not None):
        reason = choice.unsupported_by_triton(query, keys, *([] if prefix is None else [prefix.keys]))
        if choice.usable("window_scores", "Triton", reason, triton_trial, keys, keys):
            from . import _scores_triton

            return WindowScores(_scores_triton.attention_mass(query, weight, position, keys, real, prefix, scaling))
    with as_written(keys.device):
        return _by_torch(query, weight, position, keys, real, prefix, scaling, evidence, vision, gqa_reduction)


def _by_torch(
    query: Tensor,
    weight: Tensor,
    position: Tensor,
    keys: Tensor,
    real: Tensor,
    prefix: PackedKV | None,
    scaling: float,
    evidence: Evidence,
    vision: Tensor | None,
    gqa_reduction: str,
) -> WindowScores:
    """The reference."""
    batch, q_heads = query.shape[:2]
    kv_heads, seq = keys.shape[1:3]
    grouped = (query.float() * scaling).unflatten(1, (kv_heads, -1))
    seen = real[:, None] & (torch.arange(seq, device=keys.device) <= position[:, None])
    total = torch.zeros(batch, q_heads, seq, dtype=torch.float32, device=keys.device)
    result = WindowScores(total)
    if evidence.peak:
        result.peak = torch.zeros_like(total)
    if evidence.best_rank:
        result.best_rank = torch.full((batch, kv_heads, seq), seq, device=keys.device)
    if evidence.density is not None:
        result.density = torch.zeros_like(total[..., 0])
    step = max(1, MASS_AT_ONCE // total.numel())
    for rows in weight.any(0).nonzero()[:, 0].split(step):
        part = grouped[:, :, :, rows].flatten(2, 3)
        visible = seen[:, rows]
        logits = torch.cat([part @ some.float().mT for some in keys.split(KEYS_AT_ONCE, dim=2)], dim=-1)
        logits = logits.unflatten(2, (-1, len(rows))).masked_fill_(~visible[:, None, None], -torch.inf)
        lse = logits.logsumexp(-1)
        if prefix is not None:
            lse = torch.logaddexp(lse, _prefix_lse(part, prefix).view_as(lse))
        mass = (logits - lse[..., None]).exp().flatten(1, 2)
        # A row that is all padding up to here has no mass to give; its weight is 0.
        share = weight[:, None, rows, None]
        total += torch.where(share > 0, mass * share, 0).sum(2)
        if result.peak is not None:
            result.peak = torch.maximum(result.peak, torch.where(share > 0, mass, 0).amax(2))
        if result.best_rank is not None:
            candidates = visible if vision is None else visible & vision[:, None]
            of_group = mass.unflatten(1, (kv_heads, -1))
            rank = places(of_group.amax(2) if gqa_reduction == "max" else of_group.mean(2), candidates)
            result.best_rank = torch.minimum(result.best_rank, torch.where(share > 0, rank, seq).amin(2))
        if result.density is not None and evidence.density is not None:
            reached = (mass >= evidence.density * mass.amax(-1, keepdim=True)) & visible[:, None]
            dense = reached.sum(-1).float() / visible.sum(-1)[:, None]
            result.density += torch.where(share[..., 0] > 0, dense * share[..., 0], 0).sum(2)
    return result


def triton_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the Triton kernel and the reference on a small case; it reads no values."""
    from . import _scores_triton

    def case(keys: choice.Draw, values: choice.Draw, where: torch.device) -> tuple[Any, ...]:
        prefix = PackedKV(keys(450, dim), values(450, value_dim), ((300, 0), (20, 130)), (1, 0))
        weight = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]], device=where)
        position, real = torch.tensor([40, 60, 69], device=where), torch.arange(70, device=where).expand(2, -1) > 5
        return keys(2, 6, 3, dim), weight, position, keys(2, 2, 70, dim), real, prefix, dim**-0.5

    def reference(*arguments: Any) -> Tensor:
        more: tuple[Any, ...] = (PLAIN, None, "mean")
        return _by_torch(*arguments, *more).attention

    return choice.difference(_scores_triton.attention_mass, reference, case, device, dtypes)


def places(rank: Tensor, candidates: Tensor | None = None) -> Tensor:
    """The place of each candidate by its score, from 0; the number of entries for what is no candidate.

    Of two with the same score the earlier one is first.

    Parameters
    ----------
    rank : Tensor
        float [batch, kv_heads, ..., seq], higher is better.
    candidates : Tensor, optional
        bool [batch, ..., seq]. Default: all.

    Returns
    -------
    Tensor
        int64 [batch, kv_heads, ..., seq].
    """
    hidden = None if candidates is None else ~candidates[:, None]
    seq = rank.shape[-1]
    shown = rank if hidden is None else rank.masked_fill(hidden, -torch.inf)
    order = shown.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(seq, device=rank.device).expand_as(order)
    found = torch.empty_like(order).scatter_(-1, order, place)
    return found if hidden is None else found.masked_fill_(hidden, seq)


def _prefix_lse(query: Tensor, prefix: PackedKV) -> Tensor:
    """Natural-log sum of the exponentials of query [batch, kv_heads, group, dim] with the prefix keys."""
    lse = query.new_full(query.shape[:3], -torch.inf)
    for row in range(prefix.batch):
        for heads, (keys, _) in prefix.row(row):
            if keys.shape[1]:
                lse[row, heads] = (query[row, heads] @ keys.float().mT).logsumexp(-1)
    return lse
