# SPDX-License-Identifier: Apache-2.0
"""Codebooks from a sample of keys and values: k-means for each part of each head."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from plphp.kernels.books import COARSE_PART, PART, Books, LayerBooks

from .bank import QueryBank
from .entry_sampling import EntrySample
from .k_means import centroids_of, nearest_of

log = logging.getLogger("plphp")


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
    fine = centroids_of(parts, seed).half()
    # Of what the centroids leave as they are held, so that the second code takes their rounding back as well.
    left = parts - fine.float().gather(1, nearest_of(parts, fine.float())[0][..., None].expand_as(parts))
    residual = centroids_of(left, seed).half()
    coarse = None
    if states.shape[2] % COARSE_PART == 0:
        coarse = centroids_of(_parts(states, COARSE_PART), seed).half().unflatten(0, (len(states), -1))
    return Books(fine.unflatten(0, (len(states), -1)), residual.unflatten(0, (len(states), -1)), coarse)


def _parts(states: Tensor, width: int) -> Tensor:
    """The vectors of each part of each head, [kv_heads * parts, tokens, width]."""
    return states.unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1).contiguous()
