# SPDX-License-Identifier: Apache-2.0
"""Long queries on a CPU: codes are decoded once and lie beside the whole entries, so that one kernel attends to all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _coded_cpp
from .coded import CodedKV
from .coded_attention import counts_reads
from .packed import PackedKV
from .precision import as_written
from .prompt_codes import PromptCodes

Coded = CodedKV | PromptCodes


def with_decoded(query: Tensor, prefix: PackedKV, coded: Sequence[Coded]) -> tuple[PackedKV, list[Coded]]:
    """Put what codes stand for beside the whole entries, where no kernel attends to the codes themselves.

    Attention to codes by the reference pads every head of every prompt to the longest; this does not.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, query, dim].
    prefix : PackedKV
        Whole entries of ``batch`` rows.
    coded : sequence of CodedKV or PromptCodes
        Entries of the same rows in few bits.

    Returns
    -------
    prefix : PackedKV
        With the entries of the blocks that were decoded, in float32 at least; the order of entries does not matter.
    coded : list of CodedKV or PromptCodes
        The other blocks: those of which a query reads a part, and all of them on other devices, for queries that a
        kernel is made for, and where reads are counted.
    """
    if query.device.type != "cpu" or counts_reads():
        return prefix, list(coded)
    left, decoded = [], []
    dtype = torch.promote_types(query.dtype, torch.float32)
    for block in coded:
        parts = block if isinstance(block, CodedKV) else block.block
        if parts.recalls or _coded_cpp.unsupported(query, parts) is None:
            left.append(block)
        else:
            decoded += block.decoded(dtype)
    if not decoded:
        return prefix, left
    with as_written(query.device):
        return _joined([prefix, *decoded]), left


def _joined(blocks: Sequence[PackedKV]) -> PackedKV:
    """The entries of blocks of the same rows, those of a head behind each other."""
    blocks = [block.unshared() for block in blocks]
    pair = torch.cat([block.pairs() for block in blocks])
    order = pair.argsort(stable=True)
    # `stacked` as one block of many rows: where its entries go is said by their pairs alone.
    return PackedKV.stacked(_evened(blocks)).of_entries(order, pair[order], blocks[0].batch)


def _evened(blocks: Sequence[PackedKV]) -> list[PackedKV]:
    keys, values = torch.float32, torch.float32
    for block in blocks:
        keys, values = torch.promote_types(keys, block.keys.dtype), torch.promote_types(values, block.values.dtype)
    return [block.to(keys, values) for block in blocks]
