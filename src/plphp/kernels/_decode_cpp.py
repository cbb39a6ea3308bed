# SPDX-License-Identifier: Apache-2.0
"""Calls cpp/decode.cpp: attention of a few query rows over a packed prefix and a dense tail, on a CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from plphp.errors import CacheMemoryError

from .cpp_library import library
from .packed import PackedKV

PARTIAL_SUMS = 2**23
"""Numbers of partial sums that are held at once: long queries are cut."""
KERNELS = {
    (torch.float32, torch.float32): "attend_float32",
    (torch.float32, torch.bfloat16): "attend_float32_bfloat16",
    (torch.bfloat16, torch.bfloat16): "attend_bfloat16",
}
"""Functions of the library, by the dtype of queries and keys and that of values."""
_STRIDES = ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """The struct ``Call`` of cpp/call.h: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "prefix_keys", "prefix_values", "tail_keys", "tail_values")),
        *((name, ctypes.c_void_p) for name in ("index", "bias", "out", "lse")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "group", "length", "dim", "value_dim", "tail")),
        *((name, _STRIDES) for name in ("query_strides", "key_strides", "value_strides", "bias_strides")),
        ("threads", ctypes.c_int64),
        ("scaling", ctypes.c_double),
    )


def attend(
    query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """Softmax attention over a packed prefix and a dense tail; all as in `plphp.kernels.decode_attention`.

    See `attend_parts` for parameters and exceptions.

    Returns
    -------
    Tensor
        [batch, query, q_heads, dim], contiguous, in the dtype of the query.
    """
    return attend_parts(query, prefix, tail_keys, tail_values, bias, scaling, want_lse=False)[0]


def attend_parts(
    query: Tensor,
    prefix: PackedKV,
    tail_keys: Tensor,
    tail_values: Tensor,
    bias: Tensor | None,
    scaling: float,
    want_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `attend`, with the log-sum-exps of the logits.

    Parameters
    ----------
    query : Tensor
        float32 or bfloat16 [batch, q_heads, query, dim].
    prefix : PackedKV
        Its keys have the dtype of the query, and its values the dtype of the tail's; see `KERNELS`.
    tail_keys, tail_values : Tensor
        [batch, kv_heads, tail, dim].
    bias : Tensor, optional
        float32 [batch or 1, q_heads or 1, query, tail], added to the logits of the tail.
    scaling : float
        Factor on the logits.

    want_lse : bool
        Whether log-sum-exps are asked for.

    Returns
    -------
    output : Tensor
        [batch, query, q_heads, dim], contiguous, in the dtype of the query.
    lse : Tensor
        float32 [batch, q_heads, query]; empty where it is not asked for.

    Raises
    ------
    CacheMemoryError
        If there is no memory for the partial sums.
    """
    batch, q_heads, length, _ = query.shape
    kv_heads, _, value_dim = tail_values.shape[1:]
    # Pieces as call.h cuts them: several for each thread, and up to two more for each head.
    pieces = 8 * torch.get_num_threads() + 2 * batch * kv_heads
    step = max(1, PARTIAL_SUMS // (pieces * q_heads // kv_heads * value_dim))
    if step < length:
        biases = [None] * -(-length // step) if bias is None else bias.expand(-1, -1, length, -1).split(step, 2)
        parts = zip(query.split(step, 2), biases, strict=True)
        outputs, lses = zip(
            *(attend_parts(part, prefix, tail_keys, tail_values, own, scaling, want_lse) for part, own in parts),
            strict=True,
        )
        return torch.cat(outputs, 1), torch.cat(lses, 2)
    return _attended(query, prefix, tail_keys, tail_values, bias, scaling, want_lse)


def _attended(
    query: Tensor,
    prefix: PackedKV,
    tail_keys: Tensor,
    tail_values: Tensor,
    bias: Tensor | None,
    scaling: float,
    want_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Call the kernel, see `attend_parts`."""
    batch, q_heads, length, dim = query.shape
    kv_heads, tail, value_dim = tail_values.shape[1:]
    out = query.new_empty(batch, length, q_heads, value_dim)
    lse = query.new_empty(batch, q_heads, length if want_lse else 0, dtype=torch.float32)
    if bias is not None:
        # Memory for the last axis alone, which the kernel reads side by side; rows and heads may share theirs.
        bias = bias.expand(-1, -1, -1, tail).contiguous().expand(batch, q_heads, length, tail)
    prefix_keys, prefix_values = prefix.keys.contiguous(), prefix.values.contiguous()
    # Every tensor has a name that lives until the call is done: the struct holds addresses, and no references.
    states = query, prefix_keys, prefix_values, tail_keys, tail_values, prefix.index
    call = _Call(
        *(tensor.data_ptr() for tensor in states),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        lse.data_ptr() if want_lse else None,
        *(batch, kv_heads, q_heads // kv_heads, length, dim, value_dim, tail),
        *(_STRIDES(*tensor.stride()[:3]) for tensor in (query, tail_keys, tail_values)),
        _STRIDES() if bias is None else _STRIDES(*bias.stride()[:3]),
        torch.get_num_threads(),
        scaling,
    )
    if getattr(library("decode"), KERNELS[query.dtype, tail_values.dtype])(ctypes.byref(call)):
        raise CacheMemoryError(f"There is no memory for attention over {tail} new and the kept tokens.")
    return out, lse
