# SPDX-License-Identifier: Apache-2.0
"""A rotation that spreads what is large in single channels over many."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix of a width, symmetric and orthonormal: ``x @ H @ H`` is x.

    Where the width is no power of two, channels are rotated in blocks of the largest power of two that divides it.

    Returns
    -------
    Tensor
        [dim, dim].
    """
    block = dim & -dim
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = torch.block_diag(*[matrix / block**0.5] * (dim // block))
    return blocks.to(dtype).to(device)
