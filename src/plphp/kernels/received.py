# SPDX-License-Identifier: Apache-2.0
"""Attention that the entries of a sequence receive from the whole sequence, as in the layers of a vision tower."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import as_written

MASS_AT_ONCE = 2**24
"""Most numbers of the softmax mass that are held at a time: 64 MiB in float32."""
UNSEEN = -3e4
"""What is added to the logit of an entry that a query row does not see is no more; the least float16 is -6.6e4."""


@torch.no_grad()
def received_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, row: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean attention that each entry receives, over the heads and the query rows that see it.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, seq, dim].
    key : Tensor
        [batch, kv_heads, seq, dim]; ``q_heads`` is a multiple of ``kv_heads``.
    mask : Tensor, optional
        [batch or 1, 1, seq or 1, seq]; bool and True on what a query row sees, or float and added to the logits, with
        -inf, or the least number of a dtype, on what the row does not see. An entry that does not see itself is
        padding: its row does not count.
    scaling : float
        Factor on the logits.
    row : int, optional
        Position of a query row, such as that of a class token, whose attention is wanted, too.

    Returns
    -------
    Tensor
        float32 [batch, seq]; it sums to 1 over entries that see each other and nothing else, 0 on padding.
    Tensor or None
        float32 [batch, seq]; mean over the heads of the attention of ``row``, None without one.
    """
    batch, q_heads, seq, _ = query.shape
    step = max(1, MASS_AT_ONCE // (batch * q_heads * seq))
    received = torch.zeros(batch, seq, dtype=torch.float32, device=query.device)
    counts = torch.zeros_like(received)
    visible = None if mask is None else _visible(mask).expand(batch, 1, seq, seq)[:, 0]
    added = None if mask is None or mask.dtype is torch.bool else mask.expand(batch, 1, seq, seq)
    with as_written(query.device):
        for start in range(0, seq, step):
            rows = slice(start, start + step)
            seen = None if visible is None else visible[:, rows]
            mass = _mass(query[:, :, rows], key, seen, None if added is None else added[:, :, rows], scaling)
            if seen is None or visible is None:
                received += mass.sum(1)
                counts += mass.shape[1]
            else:
                counted = visible.diagonal(dim1=1, dim2=2)[:, rows, None]
                # Chosen, not multiplied: the mass of a row that sees nothing is NaN.
                received += torch.where(counted & seen, mass, 0).sum(1)
                counts += (counted & seen).sum(1)
        of_row = None if row is None else _row(query, key, mask, scaling, row % seq)
    return received / counts.clamp(min=1), of_row


def _mass(query: Tensor, key: Tensor, seen: Tensor | None, added: Tensor | None, scaling: float) -> Tensor:
    """Mean over the heads of the softmax mass, float32 [batch, rows, seq]."""
    grouped = (query.float() * scaling).unflatten(1, (key.shape[1], -1))
    logits = (grouped @ key.float().mT[:, :, None]).flatten(1, 2)
    if added is not None:
        logits += added.float()
    elif seen is not None:
        logits.masked_fill_(~seen[:, None], -torch.inf)
    return logits.softmax(-1).mean(1)


def _row(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, row: int) -> Tensor:
    """Mean over the heads of the attention of a query row, float32 [batch, seq]."""
    one = None if mask is None else mask.expand(*mask.shape[:2], query.shape[2], -1)[:, :, row : row + 1]
    seen = None if one is None else _visible(one)[:, 0]
    added = None if one is None or one.dtype is torch.bool else one
    return _mass(query[:, :, row : row + 1], key, seen, added, scaling)[:, 0]


def _visible(mask: Tensor) -> Tensor:
    """Mark what a query row sees, bool in the shape of the mask."""
    return mask if mask.dtype is torch.bool else mask > UNSEEN
