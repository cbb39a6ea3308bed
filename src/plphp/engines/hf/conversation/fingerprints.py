# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of image features: an image that was read is recognised later, without keeping it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Fingerprint = dict[tuple[str, torch.dtype], Tensor]
"""Name and dtype of a tensor -> its mark, an int64 scalar on the tensor's device."""

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element, the integer dtype that its bits are read as."""
BLOCK = 1 << 20
"""Elements that are worked on at a time, so that no copy of a long video is made."""
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""The constants of SplitMix64, as signed numbers."""


def fingerprint(item: Mapping[str, Any]) -> Fingerprint:
    """Mark the tensors of one image.

    A mark is a sum over the bits of all elements, each with an odd random factor that depends on its index, modulo
    2^64: a change of a single element always changes it. Zeros count nothing, so that an image that a processor pads to
    the size of larger images keeps its mark. It is worked out on the tensor's device, and nothing waits for it.

    Parameters
    ----------
    item : mapping
        Name -> tensor of any shape and dtype; values that are no tensors are left out.

    Returns
    -------
    dict
        See `Fingerprint`.
    """
    return {(name, value.dtype): _mark(value) for name, value in item.items() if isinstance(value, Tensor)}


def same_image(known: Fingerprint, sent: Fingerprint) -> bool:
    """Whether two fingerprints agree on the tensors that both have; tensors of different dtypes are not compared."""
    return all(int(known[key]) == int(sent[key]) for key in known.keys() & sent.keys())


def _mark(value: Tensor) -> Tensor:
    """Sum a tensor up axis by axis, from the last to the first; an int64 scalar."""
    if value.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=value.device)
    value = torch.atleast_1d(value.detach()).contiguous()
    words = value.byte() if value.dtype is torch.bool else value.view(_WORDS[value.element_size()])
    while words.ndim:
        length, rows = words.shape[-1], words.shape[:-1]
        factors = _factors(length, words.ndim, words.device)
        blocks = words.reshape(-1, length).split(max(1, BLOCK // length))
        words = torch.cat([(block.long() * factors).sum(-1) for block in blocks]).reshape(rows)
    return words


def _factors(count: int, axis: int, device: torch.device) -> Tensor:
    """Odd numbers int64 [count] by SplitMix64; the factors of a longer axis begin with those of a shorter axis."""
    state = (torch.arange(1, count + 1, device=device) + (axis << 32)) * _STEP
    state = (state ^ (state >> 30)) * _FIRST
    state = (state ^ (state >> 27)) * _SECOND
    return (state ^ (state >> 31)) | 1
