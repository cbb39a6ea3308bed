# SPDX-License-Identifier: Apache-2.0
"""Attention over a packed prefix and a dense tail."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from . import _decode_cpp, choice
from .head_groups import head_groups
from .packed import PackedKV
from .precision import as_written

TRITON_ROWS = 128
"""Most query rows [group x query] of a KV head in the Triton kernel."""
CPP_ROWS = 16
"""As many rows of a KV head are faster in the C++ kernel than in torch's, which is made for long queries and for heads
of as many entries: ragged heads of any number of rows are faster in C++."""
LONG_TRIAL = 25
"""Queries of a trial that the C++ kernel takes some rows at a time."""
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
MAX_LOGITS = 2**24
"""Logits that torch's ways hold at once; long query chunks are cut so that they stay below."""


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
    # Finite, as torch's fused kernel gives a log-sum-exp of 0 to a query that sees nothing.
    lowest = torch.finfo(dtype).min
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
        return mask.to(dtype).clamp(min=lowest)
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, lowest)


def decode_attention(
    query: Tensor,
    prefix: PackedKV,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Softmax attention of new queries over a packed prefix, all of it visible, and a dense tail.

    Nothing is concatenated or padded: the logits of both parts share one softmax. On a CUDA device a Triton kernel does
    it, where it can (`unsupported_by_triton`) and does it right (`triton_trial`); on a CPU a C++ kernel, which is built
    when it is first used, does short queries, and torch's fused kernel the rest.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, query, dim]; the last ``query`` positions of the tail.
    prefix : PackedKV
        Kept entries of ``batch`` rows.
    tail_keys, tail_values : Tensor
        [batch, kv_heads, tail, dim]. States may have different dtypes, as they do under autocast: nothing is read with
        less precision than it has.
    mask : Tensor, optional
        Over the tail, see `tail_bias`; None is causal.
    scaling : float
        Factor on the logits.

    Returns
    -------
    Tensor
        [batch, query, q_heads, dim], contiguous, in the dtype of ``query``.
    """
    length, tail, dtype = query.shape[2], tail_keys.shape[2], query.dtype
    query, prefix, tail_keys, tail_values = _evened(query, prefix, tail_keys, tail_values)
    reason = unsupported_by_triton(query, tail_keys, tail_values)
    if choice.usable("decode_attention", "Triton", reason, triton_trial, tail_keys, tail_values):
        from . import _decode_triton

        shown = None if mask is None else tail_bias(mask.to(query.device), length, tail, torch.float32)
        return _decode_triton.attend(query, prefix, tail_keys, tail_values, shown, scaling).to(dtype)
    bias = tail_bias(mask, length, tail, torch.float32)
    bias = None if bias is None else bias.to(query.device)
    # What the C++ kernel is not made for torch does well: that is no loss, and not logged.
    suits_cpp = unsupported_by_cpp(query, prefix, tail_keys, tail_values) is None
    if suits_cpp and choice.usable("decode_attention", "C++", None, cpp_trial, tail_keys, tail_values):
        return _decode_cpp.attend(query, prefix, tail_keys, tail_values, bias, scaling).to(dtype)
    with as_written(query.device):
        return _by_torch(query, prefix, tail_keys, tail_values, bias, scaling).to(dtype)


def _evened(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor
) -> tuple[Tensor, PackedKV, Tensor, Tensor]:
    """Bring values to the widest of their dtypes, and queries and keys to the widest of all.

    So values have no more bits than keys: of all pairs of dtypes, kernels have to know only these.
    """
    if query.dtype == prefix.keys.dtype == tail_keys.dtype == prefix.values.dtype == tail_values.dtype:
        return query, prefix, tail_keys, tail_values  # without a look at each, for every layer of every step
    of_values = _widest(prefix.values, tail_values)
    of_keys = _widest(query, prefix.keys, tail_keys, prefix.values, tail_values)
    return query.to(of_keys), prefix.to(of_keys, of_values), tail_keys.to(of_keys), tail_values.to(of_values)


def _widest(*states: Tensor) -> torch.dtype:
    """The dtype that holds the numbers of all states."""
    return reduce(torch.promote_types, (state.dtype for state in states))


def _by_torch(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """The reference of all kernels, with an additive mask or none at all."""
    prefix, tail_values = prefix.to(query.dtype, query.dtype), tail_values.to(query.dtype)
    batch, q_heads, length, _ = query.shape
    kv_heads = tail_keys.shape[1]
    grouped = (query * scaling).unflatten(1, (kv_heads, q_heads // kv_heads))
    if _can_be_fused(grouped, tail_keys, tail_values):
        out = _attend_fused(grouped, prefix, tail_keys, tail_values, bias)
    elif prefix.dense is not None:
        out = _attend(grouped, *prefix.dense, tail_keys, tail_values, bias)
    else:
        out = _attend_groups(grouped, prefix, tail_keys, tail_values, bias)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, q_heads, -1).contiguous()


def unsupported_by_triton(query: Tensor, tail_keys: Tensor, tail_values: Tensor) -> str | None:
    """Say why the Triton kernel cannot attend, see `decode_attention` for the arguments; None where it can."""
    if tail_values.dtype == tail_keys.dtype:
        reason = choice.unsupported_by_triton(query, tail_keys, tail_values)
    else:
        reason = choice.unsupported_by_triton(query, tail_keys) or choice.unsupported_by_triton(tail_values)
    rows = _query_rows(query, tail_keys)
    if reason is None and rows > TRITON_ROWS:
        return f"a KV head has {rows} query rows, and it takes up to {TRITON_ROWS}"
    return reason


def unsupported_by_cpp(query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor) -> str | None:
    """Say why the C++ kernel cannot attend, see `decode_attention` for the arguments; None where it can."""
    rows = _query_rows(query, tail_keys)
    if rows > CPP_ROWS and prefix.dense is not None:
        return f"a KV head has {rows} query rows, and it is faster than torch up to {CPP_ROWS} where heads are equal"
    return choice.unsupported_by_cpp(query, tail_keys, prefix.keys) or choice.unsupported_by_cpp(
        tail_values, prefix.values
    )


def triton_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the Triton kernel and the reference on a small case."""
    from . import _decode_triton

    return choice.difference(_decode_triton.attend, _by_torch, _trial_case(dim, value_dim), device, dtypes)


def cpp_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the C++ kernel and the reference on a small case.

    Raises
    ------
    BackendUnavailableError
        If it cannot be built.
    """
    cases = [_trial_case(dim, value_dim, length) for length in (1, LONG_TRIAL)]
    worst = [choice.difference(_decode_cpp.attend, _by_torch, case, device, dtypes) for case in cases]
    return torch.tensor(worst, dtype=torch.float64).max().item()  # NaN if any is


def _trial_case(dim: int, value_dim: int, length: int = 1) -> choice.Case:
    """A prefix whose rows are swapped, with an empty head and a head of several chunks, and a tail behind it."""

    def case(keys: choice.Draw, values: choice.Draw, _: torch.device) -> tuple[Any, ...]:
        prefix = PackedKV(keys(450, dim), values(450, value_dim), ((300, 0), (20, 130)), (1, 0))
        bias = tail_bias(None, length, 70, torch.float32)
        return keys(2, 6, length, dim), prefix, keys(2, 2, 70, dim), values(2, 2, 70, value_dim), bias, dim**-0.5

    return case


def _query_rows(query: Tensor, tail_keys: Tensor) -> int:
    """Query rows of a KV head."""
    return query.shape[1] // tail_keys.shape[1] * query.shape[2]


def _attend_groups(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None
) -> Tensor:
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
    return torch.cat(parts)[torch.cat(pairs).argsort(), 0].unflatten(0, (-1, kv_heads))


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
) -> Tensor:
    """Attend with query [batch, kv_heads, group, query, dim] to keys [batch, kv_heads, kept, dim] and the tail; not to
    those where padding [batch, kept] is True."""
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
        parts.append(mixed.unflatten(2, (group, -1)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


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
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None
) -> Tensor:
    """Attend with query [batch, kv_heads, group, query, dim] on a CPU.

    Prefix and tail go through torch's fused kernel, and are merged by their log-sum-exps: no public function of torch
    returns these on a CPU.
    """
    batch, kv_heads, group, length, _ = query.shape
    # The bias is spread over the query heads of a KV head.
    step = max(1, MAX_LOGITS // (batch * kv_heads * group * tail_keys.shape[2]))
    if bias is not None and step < length:
        pieces = zip(query.split(step, dim=3), bias.split(step, dim=2), strict=True)
        return torch.cat([_attend_fused(part, prefix, tail_keys, tail_values, own) for part, own in pieces], dim=3)
    rows = query.flatten(2, 3)
    if bias is not None:
        heads_of_bias = bias.unflatten(1, (-1, group) if bias.shape[1] > 1 else (1, 1))
        bias = heads_of_bias.expand(-1, -1, group, -1, -1).flatten(2, 3)
    of_tail, tail_lse = _FUSED(rows, tail_keys, tail_values, attn_mask=bias, scale=1.0)
    of_prefix, prefix_lse = _fused_prefix(rows, prefix)
    # As `merge_states` does, to the bit, but without its guards for parts that may be empty: they take longer than the
    # merge itself, here for every layer of every step, and the tail never is.
    share = torch.sigmoid(prefix_lse - tail_lse)[..., None]
    return torch.lerp(of_tail.float(), of_prefix.float(), share).to(query.dtype).unflatten(2, (group, -1))


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
