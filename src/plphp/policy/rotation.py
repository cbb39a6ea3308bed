# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of one layer: how queries and keys turn with their position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIONS = (1, 1000)
"""Where an engine looks at a query, beside 0: the first tells the layout, the second tells small frequencies apart."""
TOLERANCE = 0.02
"""Largest difference between what is expected and what is seen, as a share of the norm: the rounding of bfloat16."""
GROWING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the prompt."""


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


def explaining_rotation(seen: Mapping[int, Tensor], candidates: Sequence[Rotation]) -> Rotation | None:
    """Find the rotation by which a query turns with its position.

    Parameters
    ----------
    seen : mapping of int to Tensor
        float [q_heads, dim]; by position, among them 0, queries that differ by their rotation alone.
    candidates : sequence of Rotation
        What a layer may do, beside nothing.

    Returns
    -------
    Rotation or None
        None where none of them explains what is seen to within `TOLERANCE`.
    """
    start, turned = seen[0], {position: query for position, query in seen.items() if position != 0}

    def error(candidate: Rotation) -> float:
        if 2 * len(candidate.frequencies) > start.shape[-1]:
            return torch.inf
        return max(_difference(candidate.rotated(start, position), query) for position, query in turned.items())

    best = min([Rotation(torch.zeros(1, dtype=torch.float32)), *candidates], key=error)
    return best if error(best) <= TOLERANCE else None


def growing_kind(parameters: Mapping[str, object]) -> str | None:
    """The kind of a rotary embedding whose frequencies depend on the length of the prompt, None if they do not.

    Parameters
    ----------
    parameters : mapping
        ``rope_parameters`` of a model's config, of all layers or by type of layer.
    """
    nested = [kind for kind in parameters.values() if isinstance(kind, Mapping)]
    kinds = [str(kind.get("rope_type", "default")) for kind in (nested or [parameters])]
    return next((kind for kind in kinds if any(name in kind for name in GROWING)), None)


def _difference(expected: Tensor, seen: Tensor) -> float:
    return ((expected - seen).norm() / seen.norm()).item()
