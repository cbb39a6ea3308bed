# SPDX-License-Identifier: Apache-2.0
"""Copying the kept entries of every row and KV head into a packed block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import choice
from .packed import PackedKV


def compact_kv(keys: Tensor, values: Tensor, keep: Tensor) -> PackedKV:
    """Copy the kept entries into a packed block, in their original order.

    On a CUDA device a Triton kernel does it, where it can and does it right.

    Parameters
    ----------
    keys, values : Tensor
        [batch, kv_heads, seq, dim]; any strides, a dtype each. Evicted entries are never read, so they may hold NaN.
    keep : Tensor
        bool [batch, kv_heads, seq].

    Returns
    -------
    PackedKV
        It shares no memory with the inputs.
    """
    # The numbers of kept entries decide the shape of the result, so they have to be known on the CPU.
    counts = tuple(tuple(row) for row in keep.sum(-1).tolist())
    keep = keep.to(keys.device)
    reason = choice.unsupported_by_triton(keys) or choice.unsupported_by_triton(values)
    if choice.usable("compact_kv", "Triton", reason, triton_trial, keys, values):
        from . import _compact_triton

        packed = _compact_triton.gather(keys, values, keep, sum(map(sum, counts)))
    else:
        packed = _by_torch(keys, values, keep)
    return PackedKV(*packed, counts, tuple(range(len(counts))))


def _by_torch(keys: Tensor, values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: what is kept of the keys and the values, [kept, dim] each."""
    entries = keep.nonzero(as_tuple=True)
    return keys[entries], values[entries]


def triton_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the Triton kernel and the reference on a small case: none, as both copy."""
    from . import _compact_triton

    def case(keys: choice.Draw, values: choice.Draw, _: torch.device) -> tuple[Any, ...]:
        return keys(2, 150, 3, dim).transpose(1, 2), values(2, 3, 150, value_dim), keys(2, 3, 150) > 0

    def kernel(keys: Tensor, values: Tensor, keep: Tensor) -> Tensor:
        return torch.cat(_compact_triton.gather(keys, values, keep, int(keep.sum())), dim=1)

    def reference(keys: Tensor, values: Tensor, keep: Tensor) -> Tensor:
        return torch.cat(_by_torch(keys, values, keep), dim=1)

    return choice.difference(kernel, reference, case, device, dtypes)
