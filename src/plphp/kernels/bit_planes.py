# SPDX-License-Identifier: Apache-2.0
"""Codes of few bits as bit planes: of every code first the highest bit, then the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BYTE = 8


def pack_planes(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Cut codes into bit planes.

    Parameters
    ----------
    codes : Tensor
        Integers [entries, dim], from 0 to ``2 ** bits - 1``; ``dim`` is a multiple of 8.
    bits : int
        From 1 to 8.

    Returns
    -------
    tuple of Tensor
        The planes from the highest bit down, uint8 [entries, dim // 8] each. Bit i of byte j is of channel
        ``8 * j + i``.
    """
    weights = 2 ** torch.arange(BYTE, device=codes.device, dtype=torch.int32)
    planes = []
    for bit in reversed(range(bits)):
        plane = (codes.int() >> bit & 1).unflatten(1, (-1, BYTE))
        planes.append((plane * weights).sum(2).to(torch.uint8))
    return tuple(planes)


def unpack_planes(planes: Sequence[Tensor]) -> Tensor:
    """The codes of bit planes, see `pack_planes`: int32 [entries, dim]."""
    shifts = torch.arange(BYTE, device=planes[0].device, dtype=torch.uint8)
    codes = torch.zeros(len(planes[0]), planes[0].shape[1] * BYTE, device=planes[0].device, dtype=torch.uint8)
    for plane in planes:
        codes = codes.mul_(2).add_((plane[..., None] >> shifts).bitwise_and_(1).flatten(1))
    return codes.int()
