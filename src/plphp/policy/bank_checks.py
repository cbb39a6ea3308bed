# SPDX-License-Identifier: Apache-2.0
"""What a file of a query bank has to hold, whoever wrote it: all that is read of it later without another look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Layers = Mapping[int, tuple[Tensor, Tensor]]
"""By decoder layer, queries [q_heads, samples, dim] and the frequencies of the rotation [pairs]."""


def check_kinds(interleaved: object, record: object) -> None:
    """Check what a file says in JSON.

    Parameters
    ----------
    interleaved : object
        By decoder layer, whether its rotation pairs neighbours: a mapping of text to bool.
    record : object
        What the bank is of: a mapping.

    Raises
    ------
    ValueError
        If either is something else, or the record has no number of decoder layers.
    """
    if not isinstance(interleaved, dict) or not all(isinstance(value, bool) for value in interleaved.values()):
        raise ValueError(f"the rotations of its layers are {interleaved!r}")
    if not interleaved:
        raise ValueError("it has no layer")
    if not isinstance(record, dict):
        raise ValueError(f"its record is {record!r}")
    layers = record.get("decoder_layers")
    if type(layers) is not int or layers < 1:
        raise ValueError(f"its record says that the model has {layers!r} decoder layers")


def check_queries(layers: Layers, ahead: Tensor, record: Mapping[str, Any]) -> None:
    """Check that the queries of a file fit each other, and its record.

    Parameters
    ----------
    layers : mapping of int to tuple of Tensor
        See `Layers`; as they were read.
    ahead : Tensor
        As it was read; int64 [samples] if it is right.
    record : mapping
        It has passed `check_kinds`.

    Raises
    ------
    ValueError
        If they do not, or hold NaN or inf.
    """
    if ahead.dim() != 1 or ahead.is_floating_point() or bool((ahead < 0).any()):
        raise ValueError("it does not say how far ahead its queries came")
    for number, (queries, frequencies) in layers.items():
        if not 0 <= number < record["decoder_layers"]:
            raise ValueError(f"layer {number} is none of a model with {record['decoder_layers']} decoder layers")
        if queries.dim() != 3 or not queries.is_floating_point() or queries.shape[1] != len(ahead) or not len(queries):
            raise ValueError(f"the queries of layer {number} are {queries.dtype} {list(queries.shape)}")
        if frequencies.dim() != 1 or not frequencies.is_floating_point() or 2 * len(frequencies) > queries.shape[2]:
            raise ValueError(f"the rotation of layer {number} is {frequencies.dtype} {list(frequencies.shape)}")
        if not bool(queries.isfinite().all()) or not bool(frequencies.isfinite().all()):
            raise ValueError("it holds NaN or inf")
