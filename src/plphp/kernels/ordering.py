# SPDX-License-Identifier: Apache-2.0
"""Where each entry stands among the others by its score."""

from __future__ import annotations

import numpy as np
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
    order = falling_order(shown)
    # The inverse of the permutation: the entry that the order names first gets 0, and so on.
    ascending = torch.arange(seq, device=score.device).expand_as(order)
    positions = torch.empty_like(order).scatter_(-1, order, ascending)
    return positions if hidden is None else positions.masked_fill_(hidden, seq)


def falling_order(score: Tensor) -> Tensor:
    """Indices that put scores in falling order along the last axis, equal ones in the order in which they stand.

    On a CPU float32 scores are sorted with their indices as whole numbers of 64 bits, for which numpy has vector
    instructions: the same order as torch's stable sort, in much less time.

    Parameters
    ----------
    score : Tensor
        float [..., seq]; no NaN, or nothing is said of the order.

    Returns
    -------
    Tensor
        int64 [..., seq].
    """
    seq = score.shape[-1]
    if score.device.type != "cpu" or score.dtype != torch.float32 or seq == 0:
        return score.sort(dim=-1, descending=True, stable=True).indices
    # Adding 0 makes 0 of -0, which is equal and has other bits. Below 0 larger bits mean a smaller number.
    bits = (score.detach() + 0.0).view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys = (~rising << 32) | torch.arange(seq)
    return torch.from_numpy(np.sort(keys.numpy(), axis=-1)) & 0xFFFFFFFF
