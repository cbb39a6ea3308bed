# SPDX-License-Identifier: Apache-2.0
"""Attention in the layers that vision tokens have left inside prefill: their entries are there, and nobody sees them.

Outside of the layers the prompt keeps its length, so that positions, masks and the cache's length go on as in a whole
prompt. The entries are dropped when the layer is placed at the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def hide(mask: Tensor | None, hidden: Tensor, query_length: int) -> Tensor:
    """Hide entries of the tail from every query but their own.

    Parameters
    ----------
    mask : Tensor, optional
        Mask that transformers made, bool or additive [batch or 1, q_heads or 1, query, tail]; None is causal.
    hidden : Tensor
        bool [batch, tail]. A hidden token sees itself: the softmax of an empty row would be NaN.
    query_length : int
        The queries are the last ``query_length`` positions of the tail.

    Returns
    -------
    Tensor
        bool or additive [batch, q_heads or 1, query, tail].
    """
    tail = hidden.shape[1]
    key = torch.arange(tail, device=hidden.device)
    query = key[tail - query_length :, None]
    shown = ~hidden[:, None, None] | (key == query)
    if mask is None:
        return shown & (key <= query)
    if mask.dtype is torch.bool:
        return mask & shown
    return torch.where(shown, mask, torch.finfo(mask.dtype).min)


def attend_among_shown(
    attend: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, hidden: Tensor
) -> Tensor:
    """Attend in one whole prompt as with the mask of `hide`, without spending time on hidden tokens.

    Parameters
    ----------
    attend : callable
        The model's attention, ``(query, key, value, mask) -> (output, weights)``.
    query, key, value : Tensor
        [1, heads, seq, dim].
    mask : Tensor, optional
        Mask that transformers made, [1, q_heads or 1, seq, seq]; None is causal.
    hidden : Tensor
        bool [1, seq].

    Returns
    -------
    Tensor
        [1, seq, q_heads, dim], the layout of transformers' attention functions.
    """
    shown = (~hidden[0]).nonzero()[:, 0]
    mask = None if mask is None else mask[..., shown, :][..., shown]
    attended, _ = attend(*(states[:, :, shown] for states in (query, key, value)), mask)
    # A hidden token sees itself alone, so that its output is its own value; nobody reads what becomes of it.
    own = value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)
    output = own.to(attended.dtype).contiguous()
    output[:, shown] = attended
    return output
