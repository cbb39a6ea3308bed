# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of what is farthest from all that is chosen, by products of matrices instead of one token at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plphp.kernels.ordering import falling_order

TOGETHER = 128
"""Candidates that a round chooses among."""
AT_ONCE = 2**20
"""Cosines that are worked out at once: 4 MB in float32, however many tokens there are."""
HELD = 2**24
"""Cosines that are held as long as a choice takes, 64 MB in float32: those of 4,096 tokens."""


def all_cosines(vectors: Tensor) -> Tensor | None:
    """The cosines of all pairs of vectors, each worked out once.

    Parameters
    ----------
    vectors : Tensor
        float32 or float64 [tokens, dim], of length 1.

    Returns
    -------
    Tensor
        Same dtype [tokens, tokens]; None where they would be more than `HELD`.
    """
    tokens = len(vectors)
    if tokens**2 > HELD:
        return None
    cosines = vectors.new_empty(tokens, tokens)
    for start in range(0, tokens, TOGETHER):
        rows = slice(start, start + TOGETHER)
        behind = vectors[rows] @ vectors[start:].T
        cosines[rows, start:], cosines[start:, rows] = behind, behind.T
    return cosines


def most_remote(vectors: Tensor, cosines: Tensor | None = None) -> int:
    """The vector whose smallest cosine distance to the others is the largest; of equal ones the first.

    Parameters
    ----------
    vectors : Tensor
        float32 or float64 [tokens, dim], of length 1.
    cosines : Tensor, optional
        Same dtype [tokens, tokens]; those of `all_cosines`, where they are held.

    Returns
    -------
    int
        Its number. The time is that of ``tokens ** 2 / 2`` cosines, the memory that of `AT_ONCE` of them.
    """
    tokens = len(vectors)
    nearest = vectors.new_full((tokens,), -torch.inf)
    rows = max(1, AT_ONCE // tokens)
    for start in range(0, tokens, rows):
        own = slice(start, start + rows)
        # Each pair once: the cosines with the vectors before have been seen from there.
        behind = vectors[own] @ vectors[start:].T if cosines is None else cosines[own, start:].clone()
        behind.diagonal().fill_(-torch.inf)
        nearest[own] = torch.maximum(nearest[own], behind.amax(1))
        nearest[start:] = torch.maximum(nearest[start:], behind.amax(0))
    return int(nearest.argmin())


def extended(
    vectors: Tensor,
    worth: Tensor,
    chosen: Tensor,
    count: int,
    *,
    either_way: bool = False,
    cosines: Tensor | None = None,
) -> Tensor:
    """Choose more vectors, each time the one whose value is the largest; of equal ones the first.

    The value of a vector is its worth times its distance from the nearest that is chosen.

    A value only falls as more is chosen. So each round takes the `TOGETHER` candidates of the largest values and
    chooses among them, as long as the best of them is worth more than every vector outside had when the round began;
    then one product of matrices brings all values up to date. What is chosen is the same as one at a time, in the time
    of ``count * tokens`` cosines where they are not held; the memory is that of `TOGETHER` cosines for each token.

    Parameters
    ----------
    vectors : Tensor
        float32 or float64 [tokens, dim], of length 1.
    worth : Tensor
        Same dtype [tokens], at least 0.
    chosen : Tensor
        int64 [at least 1]; different numbers of vectors.
    count : int
        How many are chosen in the end, at most ``tokens``.
    either_way : bool
        Whether the distance is ``1 - cosine ** 2``, by which opposite vectors are alike, instead of ``1 - cosine``.
    cosines : Tensor, optional
        Same dtype [tokens, tokens]; those of `all_cosines`, where they are held.

    Returns
    -------
    Tensor
        int64 [count], in the order of choice: what is chosen of a smaller count comes first of a larger.
    """

    def distance(some: Tensor | slice, others: Tensor) -> Tensor:
        cosine = vectors[some] @ vectors[others].T if cosines is None else cosines[some][:, others]
        return 1 - (cosine.square() if either_way else cosine)

    value = torch.full_like(worth, torch.inf)
    newest = chosen
    while True:
        for some in newest.split(TOGETHER):
            value = torch.minimum(value, worth * distance(slice(None), some).amin(1))
        value[newest] = -torch.inf
        if len(chosen) >= count:
            return chosen[:count]
        order = falling_order(value)
        outside = float(value[order[TOGETHER]]) if len(order) > TOGETHER else -torch.inf
        # In the order of the vectors, so that the first of equal ones is taken.
        among = order[:TOGETHER].sort().values
        between = worth[among, None] * distance(among, among)
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
