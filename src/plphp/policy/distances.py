# SPDX-License-Identifier: Apache-2.0
"""How far vision tokens are from each other: by the angle between their features, or by where these are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cosine import unit

AT_ONCE = 2**20
"""Products that are worked out at once: 4 MB in float32, however many tokens there are."""
HELD = 2**24
"""Products that are held as long as a choice takes, 64 MB in float32: those of 4,096 tokens."""
ROWS = 128
"""Rows of products that are worked out together, each pair once."""


@dataclass(frozen=True)
class Distances:
    """Distances between pairs of vectors, from their products.

    Parameters
    ----------
    vectors : Tensor
        float32 or float64 [tokens, dim]; of length 1 where angles are compared.
    either_way : bool
        Whether the distance is ``1 - cosine ** 2``, by which opposite vectors are alike, instead of ``1 - cosine``.
    squares : Tensor, optional
        Same dtype [tokens]; the squared lengths, where the distance is the squared Euclidean one.
    held : Tensor, optional
        Same dtype [tokens, tokens]; the products of all pairs, each worked out once.
    """

    vectors: Tensor
    either_way: bool = False
    squares: Tensor | None = None
    held: Tensor | None = None

    @classmethod
    def of_angles(cls, features: Tensor, *, either_way: bool = False, hold: bool = False) -> Distances:
        """Those of the directions of features [tokens, dim]."""
        vectors = unit(features)
        return cls(vectors, either_way, None, _products(vectors) if hold else None)

    @classmethod
    def of_places(cls, features: Tensor) -> Distances:
        """The squared Euclidean ones of features [tokens, dim], in units of the largest component of any."""
        vectors = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        # What all features have in common would leave little of the digits of their products to their differences. The
        # largest component first: the squares of large numbers are inf in float32, and so may be their sum.
        largest = vectors.abs().amax()
        vectors = vectors / torch.where(largest == 0, 1, largest)
        vectors = vectors - vectors.mean(0)
        return cls(vectors, False, vectors.square().sum(1), _products(vectors))

    def __len__(self) -> int:
        return len(self.vectors)

    def between(self, some: Tensor | slice, others: Tensor | slice) -> Tensor:
        """The distances of some vectors from others, [some, others]; a tensor of its own."""
        products = self.vectors[some] @ self.vectors[others].T if self.held is None else self.held[some][:, others]
        if self.squares is not None:
            return torch.add(self.squares[some, None] + self.squares[others], products, alpha=-2)
        return 1 - (products.square() if self.either_way else products)


def _products(vectors: Tensor) -> Tensor | None:
    """The products of all pairs of vectors, [tokens, tokens]; None where they would be more than `HELD`."""
    tokens = len(vectors)
    if tokens**2 > HELD:
        return None
    products = vectors.new_empty(tokens, tokens)
    for start in range(0, tokens, ROWS):
        rows = slice(start, start + ROWS)
        behind = vectors[rows] @ vectors[start:].T
        products[rows, start:], products[start:, rows] = behind, behind.T
    return products
