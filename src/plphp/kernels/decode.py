# SPDX-License-Identifier: Apache-2.0
"""Attention over a packed prefix and a dense tail."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from . import _decode_cpp, choice
from ._decode_torch import attend as _by_torch
from ._decode_torch import attend_parts
from .coded import CodedKV
from .decoded_prefix import with_decoded
from .packed import PackedKV
from .precision import as_written
from .prompt_attention import attend_prompts
from .prompt_codes import PromptCodes

CPP_ROWS = 16
"""As many rows of a KV head are faster in the C++ kernel than in torch's, which is made for long queries and for heads
of as many entries: ragged heads of any number of rows are faster in C++."""
LONG_TRIAL = 25
"""Queries of a trial that the C++ kernel takes some rows at a time."""


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
    coded: Sequence[CodedKV | PromptCodes] = (),
) -> Tensor:
    """Softmax attention of new queries over a packed prefix and coded entries, all of them visible, and a dense tail.

    Nothing is concatenated or padded: the logits of both parts share one softmax. On a CUDA device a Triton kernel does
    it, where it can (`unsupported_by_triton`) and does it right (`triton_trial`); on a CPU a C++ kernel, which is built
    when it is first used, does short queries, and torch's fused kernel the rest, for which codes are decoded once.

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
    coded : sequence of CodedKV or PromptCodes
        Entries of ``batch`` rows in few bits, of which a query reads what their `Reading` says: see
        `plphp.kernels.coded_attention.attend_codes`. They are merged by their log-sum-exps.

    Returns
    -------
    Tensor
        [batch, query, q_heads, dim], contiguous, in the dtype of ``query``.
    """
    if coded:
        prefix, coded = with_decoded(query, prefix, coded)
    if coded:
        result = _with_lse(query, prefix, tail_keys, tail_values, mask, scaling)
        for block in coded:
            result = attend_prompts(query, block, scaling, result)
        return result[0].to(query.dtype).transpose(1, 2).contiguous()
    length, tail, dtype = query.shape[2], tail_keys.shape[2], query.dtype
    query, prefix, tail_keys, tail_values = _evened(query, prefix, tail_keys, tail_values)
    if _suits_triton(query, tail_keys, tail_values):
        from . import _decode_triton

        shown = _shown(mask, query, tail)
        return _decode_triton.attend(query, prefix, tail_keys, tail_values, shown, scaling).to(dtype)
    bias = tail_bias(mask, length, tail, torch.float32)
    bias = None if bias is None else bias.to(query.device)
    if _suits_cpp(query, prefix, tail_keys, tail_values):
        return _decode_cpp.attend(query, prefix, tail_keys, tail_values, bias, scaling).to(dtype)
    with as_written(query.device):
        return _by_torch(query, prefix, tail_keys, tail_values, bias, scaling).to(dtype)


def _with_lse(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """As `decode_attention` without codes; the output is [batch, q_heads, query, dim], beside its log-sum-exps."""
    length, tail = query.shape[2], tail_keys.shape[2]
    states = query, prefix, tail_keys, tail_values = _evened(query, prefix, tail_keys, tail_values)
    if _suits_triton(query, tail_keys, tail_values):
        from . import _decode_triton

        output, lse = _decode_triton.attend_parts(*states, _shown(mask, query, tail), scaling)
        return output.transpose(1, 2), lse
    bias = tail_bias(mask, length, tail, torch.float32)
    bias = None if bias is None else bias.to(query.device)
    if _suits_cpp(*states):
        output, lse = _decode_cpp.attend_parts(*states, bias, scaling)
        return output.transpose(1, 2), lse
    with as_written(query.device):
        output, lse = attend_parts(*states, bias, scaling, want_lse=True)
        return output.flatten(1, 2), lse.flatten(1, 2)


def _suits_triton(query: Tensor, tail_keys: Tensor, tail_values: Tensor) -> bool:
    """Whether the Triton kernel attends; if not, the reason is logged once."""
    reason = unsupported_by_triton(query, tail_keys, tail_values)
    return choice.usable("decode_attention", "Triton", reason, triton_trial, tail_keys, tail_values)


def _shown(mask: Tensor | None, query: Tensor, tail: int) -> Tensor | None:
    """The bias of the Triton kernel, which masks what is causal by itself."""
    return None if mask is None else tail_bias(mask.to(query.device), query.shape[2], tail, torch.float32)


def _suits_cpp(query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor) -> bool:
    """Whether the C++ kernel attends. What it is not made for torch does well: that is no loss, and not logged."""
    suits = unsupported_by_cpp(query, prefix, tail_keys, tail_values) is None
    return suits and choice.usable("decode_attention", "C++", None, cpp_trial, tail_keys, tail_values)


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


def unsupported_by_triton(query: Tensor, tail_keys: Tensor, tail_values: Tensor) -> str | None:
    """Say why the Triton kernel cannot attend, see `decode_attention` for the arguments; None where it can."""
    if tail_values.dtype == tail_keys.dtype:
        reason = choice.unsupported_by_triton(query, tail_keys, tail_values)
    else:
        reason = choice.unsupported_by_triton(query, tail_keys) or choice.unsupported_by_triton(tail_values)
    return reason or choice.too_many_rows(_query_rows(query, tail_keys))


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

    def lse(*arguments: Any) -> Tensor:
        return _decode_triton.attend_parts(*arguments)[1]

    case = _trial_case(dim, value_dim)
    worst = [
        choice.difference(_decode_triton.attend, _by_torch, case, device, dtypes),
        choice.difference(lse, _reference_lse, case, device, dtypes),
    ]
    return torch.tensor(worst, dtype=torch.float64).max().item()  # NaN if any is


def cpp_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the C++ kernel and the reference on small cases, in outputs and log-sum-exps.

    Raises
    ------
    BackendUnavailableError
        If it cannot be built.
    """

    def lse(*arguments: Any) -> Tensor:
        return _decode_cpp.attend_parts(*arguments)[1]

    cases = [_trial_case(dim, value_dim, length) for length in (1, LONG_TRIAL)]
    both = (_decode_cpp.attend, _by_torch), (lse, _reference_lse)
    worst = [choice.difference(kernel, reference, case, device, dtypes) for case in cases for kernel, reference in both]
    return torch.tensor(worst, dtype=torch.float64).max().item()  # NaN if any is


def _reference_lse(*arguments: Any) -> Tensor:
    """The log-sum-exps of the reference, [batch, q_heads, query]; in float64 they are always there."""
    return attend_parts(*arguments)[1].flatten(1, 2)


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
