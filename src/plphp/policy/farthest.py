# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of what is farthest from all that is chosen, by products of matrices instead of one token at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plphp.kernels.ordering import falling_order

from . import distances
from .distances import Distances

TOGETHER = 128
"""Candidates that a round chooses among."""


def most_remote(pairs: Distances) -> int:
    """The vector whose smallest distance to the others is the largest; of equal ones the first.

    Parameters
    ----------
    pairs : Distances
        Of the vectors.

    Returns
    -------
    int
        Its number. The time is that of ``tokens ** 2 / 2`` distances, the memory that of
        `plphp.policy.distances.AT_ONCE` of them.
    """
    tokens = len(pairs)
    nearest = pairs.vectors.new_full((tokens,), torch.inf)
    rows = max(1, distances.AT_ONCE // tokens)
    for start in range(0, tokens, rows):
        own = slice(start, start + rows)
        # Each pair once: the distances from the vectors before have been seen from there.
        behind = pairs.between(own, slice(start, None))
        behind.diagonal().fill_(torch.inf)
        nearest[own] = torch.minimum(nearest[own], behind.amin(1))
        nearest[start:] = torch.minimum(nearest[start:], behind.amin(0))
    return int(nearest.argmax())


def extended(pairs: Distances, worth: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Choose more vectors, each time the one whose value is the largest; of equal ones the first.

    The value of a vector is its worth times its distance from the nearest that is chosen.

    A value only falls as more is chosen. So each round takes the `TOGETHER` candidates of the largest values and
    chooses among them, as long as the best of them is worth more than every vector outside had when the round began;
    then one product of matrices brings all values up to date. What is chosen is the same as one at a time, in the time
    of ``count * tokens`` distances where their products are not held; the memory is that of `TOGETHER` distances for
    each token.

    Parameters
    ----------
    pairs : Distances
        Of the vectors.
    worth : Tensor
        In the dtype of the vectors, [tokens], at least 0.
    chosen : Tensor
        int64 [at least 1]; different numbers of vectors.
    count : int
        How many are chosen in the end, at most ``tokens``.

    Returns
    -------
    Tensor
        int64 [count], in the order of choice: what is chosen of a smaller count comes first of a larger.
    """
    value = torch.full_like(worth, torch.inf)
    newest = chosen
    while True:
        for some in newest.split(TOGETHER):
            value = torch.minimum(value, worth * pairs.between(slice(None), some).amin(1))
        value[newest] = -torch.inf
        if len(chosen) >= count:
            return chosen[:count]
        order = falling_order(value)
        outside = float(value[order[TOGETHER]]) if len(order) > TOGETHER else -torch.inf
        # In the order of the vectors, so that the first of equal ones is taken.
        among = order[:TOGETHER].sort().values
        between = worth[among, None] * pairs.between(among, among)
        newest = among[torch.tensor(_best_of(value[among], between, outside), device=among.device)]
        chosen = torch.cat([chosen, newest])


def _best_of(value: Tensor, between: Tensor, outside: float) -> list[int]:
    """Choose among candidates until one outside may be better.

    Parameters
    ----------
    value : Tensor
        float [candidates]; -inf for what is chosen already.
    between : Tensor
        float [candidates, candidates]: the value that the first has left once the second is chosen.
    outside : float
        The largest value of a vector that is no candidate.

    Returns
    -------
    list of int
        At least one, if any value is above -inf.
    """
    # On the CPU, whatever the device: steps that each look at a hundred numbers are over before a kernel would start.
    now, left = value.cpu().numpy().copy(), between.cpu().numpy()
    before = now.copy()
    best: list[int] = []
    while True:
        index = int(now.argmax())
        # One that has fallen to the value outside may stand behind another of that value there.
        if now[index] < outside or (now[index] == outside and now[index] < before[index]) or now[index] == -np.inf:
            return best
        best.append(index)
        now = np.minimum(now, left[:, index])
        now[best] = -np.inf
