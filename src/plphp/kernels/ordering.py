# SPDX-License-Identifier: Apache-2.0
"""Where each entry stands among the others by its score."""

from __future__ import annotations

import torch
from torch import Tensor


def positions_in_order(score: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Position of each candidate in the order of falling scores: 0 for the highest.

    Equal scores stand in the order of the entries, on every device: the sort is stable. What is no candidate gets the
    number of entries, which is behind all positions.

    Parameters
    ----------
    score : Tensor
        float [batch, kv_heads, ..., seq], higher is better. Candidates are above -inf, which stands for the rest in the
        sort.
    candidates : Tensor, optional
        bool [batch, ..., seq]. Default: all entries.

    Returns
    -------
    Tensor
        int64 [batch, kv_heads, ..., seq], each in [0, seq].
    """
    hidden = None if candidates is None else ~candidates[:, None]
    seq = score.shape[-1]
    shown = score if hidden is None else score.masked_fill(hidden, -torch.inf)
    order = shown.sort(dim=-1, descending=True, stable=True).indices
    # The inverse of the permutation: the entry that the order names first gets 0, and so on.
    ascending = torch.arange(seq, device=score.device).expand_as(order)
    positions = torch.empty_like(order).scatter_(-1, order, ascending)
    return positions if hidden is None else positions.masked_fill_(hidden, seq)
