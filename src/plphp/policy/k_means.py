# SPDX-License-Identifier: Apache-2.0
"""256 centroids of many sets of vectors side by side: k-means++, then Lloyd's algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.kernels.books import CENTROIDS

ROUNDS = 15
"""Of Lloyd's algorithm, at most."""
ENOUGH = 1e-3
"""Relative fall of the summed squared error below which no round follows."""
AT_ONCE = 2**22
"""Numbers in the vectors that are clustered side by side: with what is worked out of them, some 100 MB."""
DISTANCES = 2**20
"""Distances from vectors to centroids that are worked out at once; more would not stay in the cache of a CPU."""
TO_BEGIN = 2048
"""Vectors that the first centroids are drawn from."""


def centroids_of(vectors: Tensor, seed: int) -> Tensor:
    """256 centroids [problems, 256, width] of each set of vectors [problems, tokens, width]."""
    draws = torch.rand(len(vectors), CENTROIDS, 1, generator=torch.Generator().manual_seed(seed))
    together = max(1, AT_ONCE // vectors[0].numel())
    pieces = zip(vectors.split(together), draws.to(vectors.device).double().split(together), strict=True)
    # The tokens of a sample come in random order.
    return torch.cat([_settled(piece, _spread(piece[:, :TO_BEGIN], numbers)) for piece, numbers in pieces])


def _spread(vectors: Tensor, draws: Tensor) -> Tensor:
    """First centroids, [problems, 256, width]: each is a vector, drawn by its squared distance from those before.

    ``draws`` are float64 [problems, 256, 1] in [0, 1).
    """
    problems, tokens, width = vectors.shape
    chosen = []
    away = torch.ones(problems, tokens, device=vectors.device)
    for number in range(CENTROIDS):
        sums = away.double().cumsum(1)
        place = torch.searchsorted(sums, draws[:, number] * sums[:, -1:], right=True).clamp(max=tokens - 1)
        newest = vectors.gather(1, place[..., None].expand(problems, 1, width))
        chosen.append(newest)
        apart = (vectors - newest).square().sum(-1)
        away = apart if number == 0 else torch.minimum(away, apart)
    return torch.cat(chosen, dim=1)


def _settled(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Centroids after rounds of Lloyd's algorithm: each moves to the mean of the vectors that are nearest to it."""
    error = float("inf")
    for _ in range(ROUNDS):
        nearest, apart = nearest_of(vectors, centroids)
        centroids = _moved(vectors, centroids, nearest, apart)
        before, error = error, float(apart.double().sum())
        if before - error <= ENOUGH * error:
            break
    return centroids


def nearest_of(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each vector's nearest centroid, int64 [problems, tokens], and the squared distance from it."""
    lengths = centroids.square().sum(-1)[:, None]
    together = max(1, DISTANCES // (vectors.shape[0] * centroids.shape[1]))
    pieces = [torch.baddbmm(lengths, piece, centroids.mT, alpha=-2).min(-1) for piece in vectors.split(together, dim=1)]
    least, nearest = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    return nearest, (least + vectors.square().sum(-1)).clamp(min=0)


def _moved(vectors: Tensor, centroids: Tensor, nearest: Tensor, apart: Tensor) -> Tensor:
    """Means of the vectors of each centroid; those of none begin anew at the vectors that are farthest off."""
    # In float64, so that the order in which a GPU adds decides nothing.
    index = nearest[..., None].expand_as(vectors)
    sums = torch.zeros_like(centroids, dtype=torch.float64).scatter_add_(1, index, vectors.double())
    counts = torch.zeros_like(centroids[..., 0], dtype=torch.float64)
    counts = counts.scatter_add_(1, nearest, torch.ones_like(apart, dtype=torch.float64))[..., None]
    means = (sums / counts.clamp(min=1)).float()
    empty = counts[..., 0] == 0
    if not bool(empty.any()):
        return means
    farthest = apart.topk(min(CENTROIDS, apart.shape[1]), dim=1).indices
    number = (empty.cumsum(1) - 1).clamp(min=0, max=farthest.shape[1] - 1)
    place = farthest.gather(1, number)[..., None].expand_as(centroids)
    return torch.where(empty[..., None], vectors.gather(1, place), means)
