# SPDX-License-Identifier: Apache-2.0
"""Weights of a prompt's query rows, from the attention that they give each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plphp.errors import ConfigError


def row_weights(weigh: Callable[[Tensor], Tensor], among_rows: Tensor, weight: Tensor) -> Tensor:
    """Ask a method for the weights of the query rows, prompt by prompt: in a batch not all have as many.

    Parameters
    ----------
    weigh : callable
        `plphp.policy.evidence.Evidence.weigh_rows`.
    among_rows : Tensor
        float32 [batch, q_heads, window, window]; softmax mass that each query row gives to each.
    weight : Tensor
        float [batch, window]; 0 where a query row does not count in its prompt.

    Returns
    -------
    Tensor
        float32 [batch, window]; each row of the batch sums to 1.

    Raises
    ------
    ConfigError
        If the method gives another number of weights, or some that are negative or not finite.
    """
    weights = torch.zeros_like(weight)
    for number, counts in enumerate(weight > 0):
        mass = among_rows[number][:, counts][:, :, counts]
        if not bool(mass.isfinite().all()):
            weights[number] = weight[number]  # the row is kept whole, or refused: see `plphp.pruning.finite`
            continue
        own = weigh(mass)
        if own.shape != mass.shape[-1:] or not bool(((own >= 0) & own.isfinite()).all()):
            raise ConfigError(
                f"weigh_rows has to give each of the {mass.shape[-1]} query rows a finite weight of at least 0, got "
                f"the shape {tuple(own.shape)} and {own.flatten()[:4].tolist()}..."
            )
        total = own.sum()
        weights[number, counts] = torch.where(total > 0, own / total, weight[number, counts]).to(weights.dtype)
    return weights
