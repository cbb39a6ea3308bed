# SPDX-License-Identifier: Apache-2.0
"""Attention masks of layers that do not get all tokens of a prompt, or do not hold all that they have seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plphp.pruning.packing import gathered

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function of transformers: ``(module, query, key, value, mask, **kwargs) -> (output, weights)``."""


def packed_mask(mask: Tensor | None, columns: Tensor, queries: int, end: int, device: torch.device) -> Tensor | None:
    """Cut a mask of whole tokens down to the queries and the keys that are there.

    Parameters
    ----------
    mask : Tensor, optional
        Mask that transformers made for the tokens up to ``end``, bool or additive [batch or 1, q_heads or 1, query,
        seq]; None is causal.
    columns : Tensor
        int64 [batch, keys], on the CPU; logical position of each key, -1 where a row is filled up.
    queries : int
        The queries are those of the last keys.
    end : int
        Logical position behind the last token.
    device : device
        Where the queries are.

    Returns
    -------
    Tensor or None
        [batch, q_heads or 1, queries, keys]; None where causal is all that is to be said. What fills a row up sees
        itself: the softmax of an empty row would be NaN.
    """
    rows = columns[:, columns.shape[1] - queries :]
    if mask is None:
        return _causal(columns, queries).to(device) if bool((columns < 0).any()) else None
    own = gathered(mask, _places(rows, end - mask.shape[2]), 2, _hidden(mask), batch=0)
    own = gathered(own, _places(columns, end - mask.shape[3]), 3, _hidden(mask), batch=0)
    filled = (rows < 0)[:, None, :, None] & _itself(queries, columns.shape[1])
    return own.masked_fill(filled.to(own.device), True if own.dtype is torch.bool else 0)


def _causal(columns: Tensor, queries: int) -> Tensor:
    """bool [batch, 1, queries, keys]; the keys up to each query that fill no row up."""
    keys = columns.shape[1]
    earlier = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return ((columns >= 0)[:, None, None] & earlier) | _itself(queries, keys)


def _itself(queries: int, keys: int) -> Tensor:
    """bool [queries, keys]; the key of each query."""
    return torch.eye(keys, dtype=torch.bool)[keys - queries :]


def _places(position: Tensor, begin: int) -> Tensor:
    """Where positions stand in a mask that begins at one of them; -1 before it."""
    return (position - begin).clamp(min=-1).where(position >= 0, -1)


def _hidden(mask: Tensor) -> Any:
    return False if mask.dtype is torch.bool else torch.finfo(mask.dtype).min
