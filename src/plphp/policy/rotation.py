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
        frequencies = self.frequencies.to(vectors.device)
        angle = torch.as_tensor(position, device=vectors.device, dtype=torch.float32)[..., None] * frequencies
        cos, sin = angle.cos(), angle.sin()
        pairs = len(frequencies)
        moved, rest = vectors[..., : 2 * pairs].float(), vectors[..., 2 * pairs :].float()
        if self.interleaved:
            first, second = moved[..., 0::2], moved[..., 1::2]
        else:
            first, second = moved[..., :pairs], moved[..., pairs:]
        parts = first * cos - second * sin, second * cos + first * sin
        moved = torch.stack(parts, dim=-1).flatten(-2) if self.interleaved else torch.cat(parts, dim=-1)
        return torch.cat([moved, rest], dim=-1)
