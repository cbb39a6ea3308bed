# SPDX-License-Identifier: Apache-2.0
"""Which rotation explains the queries that an engine has seen at different positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from plphp.errors import UnsupportedModelError

from .rotation import Rotation

POSITIONS = (1, 1000)
"""Where an engine looks at a query, beside 0: the first tells the layout, the second tells small frequencies apart."""
TOLERANCE = 0.02
"""Largest difference between what is expected and what is seen, as a share of the norm: the rounding of bfloat16."""
GROWING = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies depend on the length of the prompt."""


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


def explaining_rotations(
    seen: Mapping[int, Mapping[int, Tensor]], candidates: Sequence[Rotation], model: str
) -> dict[int, Rotation]:
    """Find the rotation of every layer, see `explaining_rotation`.

    Parameters
    ----------
    seen : mapping of int to mapping of int to Tensor
        By decoder layer, what was seen at each position.
    candidates : sequence of Rotation
        What a layer may do, beside nothing.
    model : str
        What the message calls the model.

    Raises
    ------
    UnsupportedModelError
        If nothing explains the queries of a layer.
    """
    rotations = {}
    for layer, queries in seen.items():
        rotation = explaining_rotation(queries, candidates)
        if rotation is None:
            raise UnsupportedModelError(
                f"The queries of layer {layer} of {model} do not turn with their position as any rotary embedding that "
                "plphp knows, so they cannot be foretold."
            )
        rotations[layer] = rotation
    return rotations


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
