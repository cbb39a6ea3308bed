# SPDX-License-Identifier: Apache-2.0
"""Attention over parts of the keys, merged into the attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .precision import as_written


def merge_states(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge softmax attention over disjoint sets of keys by their log-sum-exps.

    A part i that attends to keys of its own, with logits s[i, j] and values v[i, j], leaves an output and the
    log-sum-exp of its logits; so does attention over the keys of all parts::

        lse[i]  =  ln sum_j exp(s[i, j])              output[i]  =  sum_j exp(s[i, j] - lse[i]) v[i, j]
        lse     =  ln sum_i exp(lse[i])               output     =  sum_i exp(lse[i] - lse) output[i]

    Parts may be merged in any order and grouping, as they come: keys that lie in different places, in different
    precisions or on different machines need not be brought together.

    Parameters
    ----------
    outputs : sequence of Tensor
        Of each part, float [batch, q_heads, query, value_dim]. What an empty part holds is not read: it may be NaN, as
        of a softmax over nothing.
    lses : sequence of Tensor
        Of each part, float32 or float64 [batch, q_heads, query]; -inf where a query sees no key of the part.

    Returns
    -------
    output : Tensor
        [batch, q_heads, query, value_dim], in the widest dtype of ``outputs``. 0 where all parts are empty.
    lse : Tensor
        [batch, q_heads, query], in the widest dtype of ``lses``, at least float32. -inf where all parts are empty.

    Raises
    ------
    ValueError
        If there is no part, if there are not as many outputs as log-sum-exps, or if their shapes do not fit.

    Notes
    -----
    Exponentials of log-sum-exps are never taken, as they overflow in float32 from 89 on: two parts are mixed by the
    sigmoid of the difference of theirs, which is in [0, 1] whatever their size. The mean of the parts is accumulated in
    float32, or in float64 if an input is, under autocast too, and rounded once at the end.

    What is NaN in the output of a part is NaN in the result, and a log-sum-exp of NaN makes its whole row NaN; an
    infinite number in an output becomes infinite or NaN. Both results have a gradient, also where parts are empty.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867, section 3; to merge split
    keys, flash-decoding: https://pytorch.org/blog/flash-decoding
    """
    _check(outputs, lses)
    dtype = reduce(torch.promote_types, (output.dtype for output in outputs))
    lse_dtype = reduce(torch.promote_types, (lse.dtype for lse in lses), torch.float32)
    accumulated = torch.promote_types(dtype, lse_dtype)
    with as_written(outputs[0].device):
        merged, total, empty = _state(outputs[0], lses[0], accumulated)
        for output, lse in zip(outputs[1:], lses[1:], strict=True):
            part, part_lse, part_empty = _state(output, lse, accumulated)
            empty = empty & part_empty
            # -inf less -inf would be NaN, in the result or its gradient. Where both are, both outputs are 0.
            total, part_lse = total.masked_fill(empty, 0), part_lse.masked_fill(empty, 0)
            merged = torch.lerp(merged, part, torch.sigmoid(part_lse - total)[..., None])
            total = torch.logaddexp(total, part_lse).masked_fill(empty, -torch.inf)
        return merged.to(dtype), total.to(lse_dtype)


def _state(output: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the output and log-sum-exp of a part in a dtype, and where the part is empty: there the output is 0."""
    empty = lse == -torch.inf
    return torch.where(empty[..., None], 0, output).to(dtype), lse.to(dtype, copy=True), empty


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Raise ValueError unless every part has an output and a log-sum-exp of the same shapes: others would broadcast."""
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"Each part has an output and a log-sum-exp, and there is at least one part: got {len(outputs)} outputs "
            f"and {len(lses)} log-sum-exps."
        )
    kinds = {tensor.dtype for tensor in (*outputs, *lses) if not tensor.is_floating_point()}
    if kinds:
        raise ValueError(f"Outputs and log-sum-exps are floating-point tensors, got {', '.join(map(str, kinds))}.")
    shape = outputs[0].shape
    if any(output.shape != shape for output in outputs) or any(lse.shape != shape[:-1] for lse in lses):
        raise ValueError(
            "Outputs are [batch, q_heads, query, value_dim] and log-sum-exps [batch, q_heads, query], the same in all "
            f"parts: got {[tuple(output.shape) for output in outputs]} and {[tuple(lse.shape) for lse in lses]}."
        )
