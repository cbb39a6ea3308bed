# SPDX-License-Identifier: Apache-2.0
"""Attention of the prompt's last queries over all keys, without a seq x seq matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import PackedKV

KEYS_AT_ONCE = 2048
"""Keys that are held in float32 at once."""


def window_scores(
    query: Tensor,
    weight: Tensor,
    position: Tensor,
    keys: Tensor,
    real: Tensor,
    prefix: PackedKV | None,
    scaling: float,
) -> Tensor:
    """Softmax mass that a few query rows give to every entry of the tail, over prefix and tail together.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, window, dim]; post-RoPE queries.
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

    Returns
    -------
    Tensor
        float32 [batch, q_heads, seq]; computed in float32. NaN where a query or a visible key is NaN.
    """
    batch, q_heads, window, _ = query.shape
    kv_heads, seq = keys.shape[1:3]
    grouped = (query.float() * scaling).unflatten(1, (kv_heads, -1))
    seen = real[:, None] & (torch.arange(seq, device=keys.device) <= position[:, None])
    total = torch.zeros(batch, q_heads, seq, dtype=torch.float32, device=keys.device)
    for row in range(window):
        if not weight[:, row].any():
            continue
        one = grouped[:, :, :, row]
        logits = torch.cat([one @ part.float().mT for part in keys.split(KEYS_AT_ONCE, dim=2)], dim=-1)
        logits.masked_fill_(~seen[:, None, None, row], -torch.inf)
        lse = logits.logsumexp(-1)
        if prefix is not None:
            lse = torch.logaddexp(lse, _prefix_lse(one, prefix))
        mass = (logits - lse[..., None]).exp().flatten(1, 2)
        # A row that is all padding up to here has no mass to give; its weight is 0.
        total += torch.where(weight[:, row, None, None] > 0, mass * weight[:, row, None, None], 0)
    return total


def _prefix_lse(query: Tensor, prefix: PackedKV) -> Tensor:
    """Natural-log sum of the exponentials of query [batch, kv_heads, group, dim] with the prefix keys."""
    lse = torch.full(query.shape[:3], -torch.inf, device=query.device)
    for row in range(prefix.batch):
        for heads, (keys, _) in prefix.row(row):
            if keys.shape[1]:
                lse[row, heads] = (query[row, heads] @ keys.float().mT).logsumexp(-1)
    return lse
