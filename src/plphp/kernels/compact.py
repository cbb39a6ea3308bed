# SPDX-License-Identifier: Apache-2.0
"""Gather the kept entries of every row and KV head."""

from __future__ import annotations

from torch import Tensor

from ..packed import PackedKV


def compact_kv(keys: Tensor, values: Tensor, keep: Tensor) -> PackedKV:
    """Copy the kept entries into a packed block, in their original order.

    Parameters
    ----------
    keys, values : Tensor
        [batch, kv_heads, seq, dim]; any strides. Evicted entries are never read, so they may hold NaN.
    keep : Tensor
        bool [batch, kv_heads, seq].

    Returns
    -------
    PackedKV
        It shares no memory with the inputs.
    """
    counts = tuple(tuple(row) for row in keep.sum(-1).tolist())
    keep = keep.to(keys.device)
    return PackedKV(keys[keep], values[keep], counts, tuple(range(len(counts))))
