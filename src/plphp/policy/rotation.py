# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of one layer: how queries and keys turn with their position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of one layer, for text: all axes of a multimodal one have the same position.

    Parameters
    ----------
    frequencies : Tensor
        float32 [pairs]; angle per position. All 0 for a layer without positions.
    interleaved : bool
        Whether a pair is two neighbours (2i, 2i+1); otherwise it is i and i + pairs. What is behind the pairs is not
        turned.
    """

    frequencies: Tensor
    interleaved: bool = False

    def is_like(self, other: Rotation) -> bool:
        """Whether both turn a vector alike, but for the rounding of frequencies that an engine had to work out."""
        own, theirs = self.frequencies.cpu(), other.frequencies.cpu()
        if self.interleaved != other.interleaved or own.shape != theirs.shape:
            return False
        return torch.allclose(own, theirs, rtol=1e-4, atol=0)

    def rotated(self, vectors: Tensor, position: Tensor | float) -> Tensor:
        """Rotate vectors on by a number of positions.

        Parameters
        ----------
        vectors : Tensor
            float [..., dim].
        position : Tensor or float
            Number of positions, broadcast over the axes before the last; negative rotates back.

        Returns
        -------
        Tensor
            float32 [..., dim].
        """
        angle = self._angle(vectors, torch.as_tensor(position, device=vectors.device, dtype=torch.float32))
        return self._turned(vectors, angle.cos(), angle.sin())

    def rotated_on_average(self, vectors: Tensor, begin: Tensor, positions: int) -> Tensor:
        """Rotate vectors on by each of some successive numbers of positions, and take the mean.

        Parameters
        ----------
        vectors : Tensor
            float [..., dim].
        begin : Tensor
            The first number, broadcast over the axes of ``vectors`` before the last.
        positions : int
            How many numbers.

        Returns
        -------
        Tensor
            float32 [..., dim].
        """
        ahead = torch.arange(positions, device=vectors.device, dtype=torch.float32)
        angle = self._angle(vectors, begin.to(vectors.device)[..., None] + ahead)
        return self._turned(vectors, angle.cos().mean(-2), angle.sin().mean(-2))

    def _angle(self, vectors: Tensor, position: Tensor) -> Tensor:
        return position[..., None] * self.frequencies.to(vectors.device)

    def _turned(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the pairs of vectors [..., dim] by angles with these cosines and sines, [..., pairs]."""
        pairs = len(self.frequencies)
        moved, rest = vectors[..., : 2 * pairs].float(), vectors[..., 2 * pairs :].float()
        if self.interleaved:
            first, second = moved[..., 0::2], moved[..., 1::2]
        else:
            first, second = moved[..., :pairs], moved[..., pairs:]
        parts = first * cos - second * sin, second * cos + first * sin
        moved = torch.stack(parts, dim=-1).flatten(-2) if self.interleaved else torch.cat(parts, dim=-1)
        return torch.cat([moved, rest], dim=-1)
