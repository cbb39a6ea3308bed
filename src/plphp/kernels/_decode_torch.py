# SPDX-License-Identifier: Apache-2.0
"""Attention over a packed prefix and a dense tail in torch: the reference, and what runs without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import choice
from .head_groups import head_groups
from .packed import PackedKV

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
MAX_LOGITS = 2**24
"""Logits that are held at once; long query chunks are cut so that they stay below."""


def attend(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """The reference of all kernels, with an additive mask or none at all."""
    out, _ = attend_parts(query, prefix, tail_keys, tail_values, bias, scaling)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def attend_parts(
    query: Tensor,
    prefix: PackedKV,
    tail_keys: Tensor,
    tail_values: Tensor,
    bias: Tensor | None,
    scaling: float,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output [batch, kv_heads, group, query, dim] and its log-sum-exps, which may be empty where they are not asked
    for."""
    prefix, tail_values = prefix.to(query.dtype, query.dtype), tail_values.to(query.dtype)
    grouped = (query * scaling).unflatten(1, (tail_keys.shape[1], -1))
    if _can_be_fused(grouped, tail_keys, tail_values):
        return _attend_fused(grouped, prefix, tail_keys, tail_values, bias, want_lse)
    if prefix.dense is not None:
        return _attend(grouped, *prefix.dense, tail_keys, tail_values, bias)
    return _attend_groups(grouped, prefix, tail_keys, tail_values, bias)


def _attend_groups(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend as `_attend` does, where rows or heads hold different numbers of entries."""
    kv_heads, group, length, dim = query.shape[1:]
    pairs, parts = [], []
    for heads in head_groups(prefix, max(dim, group * length)):
        row, head = heads.pairs // kv_heads, heads.pairs % kv_heads
        query_of, tail_keys_of, tail_values_of = (states[row, head, None] for states in (query, tail_keys, tail_values))
        own = None if bias is None else _bias_of(bias, row, head, group)
        keys, values = heads.keys[:, None], heads.values[:, None]
        parts.append(_attend(query_of, keys, values, tail_keys_of, tail_values_of, own, heads.padding))
        pairs.append(heads.pairs)
    order = torch.cat(pairs).argsort()
    outputs, lses = (torch.cat(states)[order, 0].unflatten(0, (-1, kv_heads)) for states in zip(*parts, strict=True))
    return outputs, lses


def _bias_of(bias: Tensor, row: Tensor, head: Tensor, group: int) -> Tensor:
    """The bias of some KV heads of some rows, [heads or 1, 1 or group, query, tail]."""
    by_head = bias.unflatten(1, (-1, group) if bias.shape[1] > 1 else (1, 1))
    return by_head[row if bias.shape[0] > 1 else 0 * row[:1], head if bias.shape[1] > 1 else 0 * head[:1]]


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    bias: Tensor | None,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with query [batch, kv_heads, group, query, dim] to keys [batch, kv_heads, kept, dim] and the tail; not to
    those where padding [batch, kept] is True. Returns the output and the log-sum-exps."""
    batch, kv_heads, group, length, _ = query.shape
    kept, tail = keys.shape[2], tail_keys.shape[2]
    step = max(1, MAX_LOGITS // max(1, batch * kv_heads * group * (kept + tail)))
    parts = []
    for start in range(0, length, step):
        part = query if step >= length else query[:, :, :, start : start + step]
        rows = part.flatten(2, 3)
        logits = torch.cat([rows @ keys.mT, rows @ tail_keys.mT], dim=-1)
        # In half precision the lowest number of a bias would be -inf, and a row of these has no softmax.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if padding is not None:
            logits[..., :kept].masked_fill_(padding[:, None, None], -torch.inf)
        if bias is not None:
            shown = logits.view(batch, kv_heads, group, -1, kept + tail)[..., kept:]
            shown += bias[:, :, start : start + step].unflatten(1, (-1, group) if bias.shape[1] > 1 else (1, 1))
        weights = logits.softmax(-1).to(values.dtype)
        mixed = weights[..., :kept] @ values + weights[..., kept:] @ tail_values
        parts.append((mixed.unflatten(2, (group, -1)), logits.logsumexp(-1).unflatten(2, (group, -1))))
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=3), torch.cat(lses, dim=3)


def _can_be_fused(query: Tensor, tail_keys: Tensor, tail_values: Tensor) -> bool:
    """Whether `_attend_fused` gives what `_attend` gives."""
    states = (query, tail_keys, tail_values)
    return (
        query.device.type == "cpu"
        and query.dtype in choice.TOLERANCE
        and tail_values.shape[-1] == query.shape[-1]
        # The kernel does not look at the last stride. Log-sum-exps have no gradient.
        and all(state.stride(-1) == 1 and not state.requires_grad for state in states)
    )


def _attend_fused(
    query: Tensor,
    prefix: PackedKV,
    tail_keys: Tensor,
    tail_values: Tensor,
    bias: Tensor | None,
    want_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend with query [batch, kv_heads, group, query, dim] on a CPU.

    Prefix and tail go through torch's fused kernel, and are merged by their log-sum-exps: no public function of torch
    returns these on a CPU.
    """
    batch, kv_heads, group, length, _ = query.shape
    # The bias is spread over the query heads of a KV head.
    step = max(1, MAX_LOGITS // (batch * kv_heads * group * tail_keys.shape[2]))
    if bias is not None and step < length:
        pieces = zip(query.split(step, dim=3), bias.split(step, dim=2), strict=True)
        parts = [_attend_fused(part, prefix, tail_keys, tail_values, own, want_lse) for part, own in pieces]
        outputs, lses = zip(*parts, strict=True)
        return torch.cat(outputs, dim=3), torch.cat(lses, dim=3)
    rows = query.flatten(2, 3)
    if bias is not None:
        heads_of_bias = bias.unflatten(1, (-1, group) if bias.shape[1] > 1 else (1, 1))
        bias = heads_of_bias.expand(-1, -1, group, -1, -1).flatten(2, 3)
    of_tail, tail_lse = _FUSED(rows, tail_keys, tail_values, attn_mask=bias, scale=1.0)
    of_prefix, prefix_lse = _fused_prefix(rows, prefix)
    # As `merge_states` does, to the bit, but without its guards for parts that may be empty: they take longer than the
    # merge itself, here for every layer of every step, and the tail never is.
    share = torch.sigmoid(prefix_lse - tail_lse)[..., None]
    mixed = torch.lerp(of_tail.float(), of_prefix.float(), share).to(query.dtype).unflatten(2, (group, -1))
    lse = torch.logaddexp(prefix_lse, tail_lse) if want_lse else tail_lse
    return mixed, lse.unflatten(2, (group, -1))


def _fused_prefix(rows: Tensor, prefix: PackedKV) -> tuple[Tensor, Tensor]:
    """Attention of rows [batch, kv_heads, rows, dim] over the prefix by torch's fused kernel, and its log-sum-exps.

    They are 0 and -inf for heads without entries.
    """
    if prefix.dense is not None and prefix.counts[0][0]:
        output, lse = _FUSED(rows, *prefix.dense, scale=1.0)
        return output, lse
    flat = rows.flatten(0, 1)
    outputs, lses = torch.zeros_like(flat), flat.new_full(flat.shape[:2], -torch.inf, dtype=torch.float32)
    for heads in head_groups(prefix, flat.shape[2]):
        if not heads.keys.shape[1]:
            continue
        mask = None
        if heads.padding is not None:
            padding = heads.padding[:, None, None]
            mask = torch.zeros(padding.shape, dtype=torch.float32).masked_fill_(padding, -torch.inf)
            mask = mask.expand(-1, -1, flat.shape[1], -1)
        states = (states[:, None] for states in (flat[heads.pairs], heads.keys, heads.values))
        output, lse = _FUSED(*states, attn_mask=mask, scale=1.0)
        outputs[heads.pairs], lses[heads.pairs] = output[:, 0], lse[:, 0]
    return outputs.view_as(rows), lses.view(rows.shape[:3])
