# SPDX-License-Identifier: Apache-2.0
"""Codebooks from a sample of keys and values: k-means, for all heads and all parts of a head side by side."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from plphp.kernels.books import CENTROIDS, COARSE_PART, PART, Books, LayerBooks

from .bank import QueryBank
from .entry_sampling import EntrySample

log = logging.getLogger("plphp")

ROUNDS = 15
"""Of Lloyd's algorithm, at most."""
ENOUGH = 1e-3
"""Relative fall of the summed squared error below which no round follows."""
ROOM = 2**24
"""Distances, from every vector to every centroid, that are worked out at once: 64 MB."""


def with_books(bank: QueryBank, device: torch.device | None = None) -> QueryBank:
    """The bank with codebooks in the place of the entries that were sampled for them, if there are any.

    Parameters
    ----------
    bank : QueryBank
        It stays as it is.
    device : torch.device, optional
        Where they are learned; default: main memory. They are held there in any case.
    """
    sample = bank.sampled
    if sample is None:
        return bank
    return dataclasses.replace(bank, books=learned(sample, device), sampled=None)


def learned(sample: EntrySample, device: torch.device | None = None, seed: int = 0) -> dict[int, LayerBooks]:
    """Codebooks of every layer of a sample, in main memory, see `with_books`.

    Parameters
    ----------
    sample : EntrySample
        At least one token.
    device : torch.device, optional
        Where they are learned; default: main memory.
    seed : int
        Of the first centroids. On a CPU the same sample and seed give the same codebooks.
    """
    log.info("Learning codebooks for %d layers from %d vision tokens.", len(sample.layers), len(sample))
    memory = torch.device("cpu")
    return {
        layer: LayerBooks(*(learn(states.to(device or memory), seed).to(memory) for states in pair))
        for layer, pair in sample.layers.items()
    }


@torch.no_grad()
def learn(states: Tensor, seed: int = 0) -> Books:
    """The codebooks of the keys or values of a layer.

    Parameters
    ----------
    states : Tensor
        float [kv_heads, tokens, dim]; ``dim`` is a multiple of 8. Fewer distinct vectors than centroids will do: each
        is a centroid then.
    seed : int
        Of the first centroids.

    Returns
    -------
    Books
        On the device of ``states``.
    """
    states = states.float()
    parts = _parts(states, PART)
    fine = _centroids(parts, seed).half()
    # Of what the centroids leave as they are held, so that the second code takes their rounding back as well.
    left = parts - fine.float().gather(1, _nearest(parts, fine.float())[0][..., None].expand_as(parts))
    residual = _centroids(left, seed).half()
    coarse = None
    if states.shape[2] % COARSE_PART == 0:
        coarse = _centroids(_parts(states, COARSE_PART), seed).half().unflatten(0, (len(states), -1))
    return Books(fine.unflatten(0, (len(states), -1)), residual.unflatten(0, (len(states), -1)), coarse)


def _parts(states: Tensor, width: int) -> Tensor:
    """The vectors of each part of each head, [kv_heads * parts, tokens, width]."""
    return states.unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1).contiguous()


def _centroids(vectors: Tensor, seed: int) -> Tensor:
    """256 centroids [problems, 256, width] of each set of vectors [problems, tokens, width]."""
    draws = torch.rand(len(vectors), CENTROIDS, 1, generator=torch.Generator().manual_seed(seed))
    together = max(1, ROOM // (vectors.shape[1] * CENTROIDS))
    pieces = zip(vectors.split(together), draws.to(vectors.device).double().split(together), strict=True)
    return torch.cat([_settled(piece, _spread(piece, numbers)) for piece, numbers in pieces])


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
        nearest, apart = _nearest(vectors, centroids)
        centroids = _moved(vectors, centroids, nearest, apart)
        before, error = error, float(apart.double().sum())
        if before - error <= ENOUGH * error:
            break
    return centroids


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each vector's nearest centroid, int64 [problems, tokens], and the squared distance from it."""
    together = max(1, ROOM // (vectors.shape[1] * centroids.shape[1]))
    pieces = [_of_piece(*piece) for piece in zip(vectors.split(together), centroids.split(together), strict=True)]
    nearest, apart = zip(*pieces, strict=True)
    return torch.cat(nearest), torch.cat(apart)


def _of_piece(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    lengths = centroids.square().sum(-1)[:, None]
    least, nearest = torch.baddbmm(lengths, vectors, centroids.mT, alpha=-2).min(-1)
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
