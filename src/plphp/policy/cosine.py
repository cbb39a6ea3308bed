# SPDX-License-Identifier: Apache-2.0
"""Vectors of length 1, whose products are cosine similarities."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(vectors: Tensor) -> Tensor:
    """Vectors scaled to length 1; those of zeros stay zeros, so that their cosine with any other is 0.

    Parameters
    ----------
    vectors : Tensor
        float [..., dim]; finite.

    Returns
    -------
    Tensor
        float32, or float64 for such vectors, [..., dim], without a gradient.
    """
    # A cosine in bfloat16 has 8 bits, and neighbouring tokens often differ by less.
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    # The largest component first: the squares of large numbers are inf in float32, those of small ones 0.
    largest = torch.linalg.vector_norm(vectors, ord=torch.inf, dim=-1, keepdim=True)
    scaled = vectors / torch.where(largest == 0, 1, largest)
    return scaled.div_(torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1))


def rounding(vectors: Tensor) -> float:
    """Difference between cosines of unit vectors [..., dim] up to which it may be rounding alone."""
    return 32 * torch.finfo(vectors.dtype).eps * float(vectors.shape[-1]) ** 0.5
