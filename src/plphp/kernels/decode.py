# SPDX-License-Identifier: Apache-2.0
"""Attention over a packed prefix and a dense tail."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packed import PackedKV

MAX_LOGITS = 2**24
"""Logits that are held at once; long query chunks are cut so that they stay below."""


def tail_bias(mask: Tensor | None, query_length: int, tail_length: int, dtype: torch.dtype) -> Tensor | None:
    """Turn any mask of transformers over the tail into an additive one.

    Parameters
    ----------
    mask : Tensor, optional
        bool (True is visible) or additive [batch or 1, q_heads or 1, query, tail], or bool / int
        [batch, tail] padding as the flash attention functions take. None is causal.
    query_length, tail_length : int
        The queries are the last ``query_length`` of the tail's positions.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor or None
        Additive [batch or 1, q_heads or 1, query, tail]; None where every query sees the whole tail.
    """
    device = None if mask is None else mask.device
    causal = None
    if (mask is None or mask.ndim == 2) and query_length > 1:
        causal = torch.ones(query_length, tail_length, dtype=torch.bool, device=device)
        causal = causal.tril(tail_length - query_length)[None, None]
    if mask is None:
        visible = causal
    elif mask.ndim == 2:
        padding = mask[:, None, None, -tail_length:].bool()
        visible = padding if causal is None else padding & causal
    elif mask.dtype is torch.bool:
        visible = mask
    else:
        return mask.to(dtype)
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def decode_attention(
    query: Tensor,
    prefix: PackedKV,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Softmax attention of new queries over a packed prefix, all of it visible, and a dense tail.

    Nothing is concatenated or padded: the logits of both parts share one softmax.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, query, dim]; the last ``query`` positions of the tail.
    prefix : PackedKV
        Kept entries of ``batch`` rows.
    tail_keys, tail_values : Tensor
        [batch, kv_heads, tail, dim].
    mask : Tensor, optional
        Over the tail, see `tail_bias`; None is causal.
    scaling : float
        Factor on the logits.

    Returns
    -------
    Tensor
        [batch, query, q_heads, dim], contiguous, in the dtype of ``query``.
    """
    batch, q_heads, length, _ = query.shape
    kv_heads, tail = tail_keys.shape[1:3]
    bias = tail_bias(mask, length, tail, torch.float32)
    if bias is not None:
        bias = bias.to(query.device).expand(batch, q_heads if bias.shape[1] > 1 else 1, -1, -1)
    grouped = (query * scaling).unflatten(1, (kv_heads, q_heads // kv_heads))
    if prefix.dense is not None:
        out = _attend(grouped, *prefix.dense, tail_keys, tail_values, bias)
    else:
        rows = []
        for row in range(batch):
            one = slice(row, row + 1)
            parts = [
                _attend(
                    grouped[one, heads],
                    keys[None],
                    values[None],
                    tail_keys[one, heads],
                    tail_values[one, heads],
                    _heads_of(bias, row, heads, q_heads // kv_heads),
                )
                for heads, (keys, values) in prefix.row(row)
            ]
            rows.append(torch.cat(parts, dim=1))
        out = torch.cat(rows)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, q_heads, -1).contiguous()


def _heads_of(bias: Tensor | None, row: int, heads: slice, group: int) -> Tensor | None:
    if bias is None:
        return None
    if bias.shape[1] == 1:
        return bias[row : row + 1]
    return bias[row : row + 1, heads.start * group : heads.stop * group]


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None
) -> Tensor:
    """Attend with query [batch, kv_heads, group, query, dim] to keys [batch, kv_heads, kept, dim] and the tail."""
    batch, kv_heads, group, length, dim = query.shape
    kept, tail = keys.shape[2], tail_keys.shape[2]
    if length == 1 and bias is None and kept and query.device.type == "cpu" and values.shape[-1] == dim:
        return _attend_one(query[:, :, :, 0], keys, values, tail_keys, tail_values)[:, :, :, None]
    step = max(1, MAX_LOGITS // max(1, batch * kv_heads * group * (kept + tail)))
    parts = []
    for start in range(0, length, step):
        part = query if step >= length else query[:, :, :, start : start + step]
        rows = part.flatten(2, 3)
        logits = torch.cat([rows @ keys.mT, rows @ tail_keys.mT], dim=-1).float()
        if bias is not None:
            shown = logits.view(batch, kv_heads, group, -1, kept + tail)[..., kept:]
            shown += bias[:, :, start : start + step].unflatten(1, (-1, group) if bias.shape[1] > 1 else (1, 1))
        weights = logits.softmax(-1).to(values.dtype)
        mixed = weights[..., :kept] @ values + weights[..., kept:] @ tail_values
        parts.append(mixed.unflatten(2, (group, -1)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, tail_keys: Tensor, tail_values: Tensor) -> Tensor:
    """Attend with one query per head on a CPU: query [batch, kv_heads, group, dim], nothing masked.

    Each part goes through torch's fused kernel, and the two are merged by their log-sum-exps. On a CPU no public
    function returns these.
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    first, first_lse = fused(query, keys, values, scale=1.0)
    second, second_lse = fused(query, tail_keys, tail_values, scale=1.0)
    share = torch.sigmoid(first_lse - second_lse)[..., None]
    return torch.lerp(second.float(), first.float(), share).to(query.dtype)
