# SPDX-License-Identifier: Apache-2.0
"""Attention over the coded entries of many prompts: one call over all parts, merged by their log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor

from .coded import CodedKV
from .coded_attention import attend_codes, merged
from .precision import as_written
from .prompt_codes import PromptCodes


def attend_prompts(
    query: Tensor, coded: CodedKV | PromptCodes, scaling: float, more: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of queries over coded entries of one prompt, or of many.

    Every part of a row is attended to as if it were a row of its own, by the same query; what comes of the parts of a
    row is merged at once, however many they are.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, query, dim].
    coded : CodedKV or PromptCodes
        Of ``batch`` rows.
    scaling : float
        Factor on the logits.
    more : tuple of Tensor, optional
        See `plphp.kernels.coded_attention.attend_codes`.

    Returns
    -------
    output : Tensor
        [batch, q_heads, query, value_dim].
    lse : Tensor
        [batch, q_heads, query]; -inf where a row holds nothing.
    """
    if isinstance(coded, CodedKV):
        return attend_codes(query, coded, scaling, more)
    if coded.is_plain:
        return attend_codes(query, coded.block, scaling, more)
    output, lse = attend_codes(query.index_select(0, coded.readers), coded.block, scaling)
    with as_written(query.device):
        return merged(more, _of_rows(output, lse, coded.parts))


def _of_rows(output: Tensor, lse: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Merge outputs [parts, q_heads, query, value_dim] and log-sum-exps [parts, q_heads, query] row by row of
    ``parts``, int64 [batch, most]."""
    index, missing = parts.clamp(min=0), (parts < 0)[..., None, None]
    of_rows = lse[index].masked_fill(missing, -torch.inf)
    total = of_rows.logsumexp(1)
    # A row that holds nothing would have -inf less -inf.
    weights = (of_rows - total.masked_fill(total == -torch.inf, 0)[:, None]).exp()
    of_parts = output[index].to(weights.dtype).masked_fill(missing[..., None], 0)  # NaN stays in its row
    return (of_parts * weights[..., None]).sum(1), total
