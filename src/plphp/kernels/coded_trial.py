# SPDX-License-Identifier: Apache-2.0
"""Small cases of attention over coded entries, on which kernels are tried against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from . import choice
from .books import Books, LayerBooks
from .codecs import Codes
from .coded import CodedKV, Reading
from .coder import Coder
from .rungs import RUNGS

LOWEST = -1e6
"""What stands for the log-sum-exp of nothing: -inf less -inf would be no number."""
CASES = ((1, Reading()), (3, Reading(0.25)), (1, Reading(0.25, rest=False)))
"""Queries of a row, and what they read."""

Attend = Callable[[Tensor, CodedKV, float], tuple[Tensor, Tensor]]
"""Attends as `plphp.kernels.coded_attention.attend_codes` does."""


def difference(
    kernel: Attend, reference: Attend, device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int
) -> float:
    """Largest difference between a kernel and the reference, in outputs and log-sum-exps; see `choice.difference`."""
    worst = []
    for length, reading in CASES:
        # Both get the same codes: of numbers that are cast, they would be others.
        coded = _block(dim, value_dim, reading)

        def case(
            keys: choice.Draw, _: choice.Draw, where: torch.device, length: int = length, coded: CodedKV = coded
        ) -> tuple[Tensor, CodedKV]:
            return keys(2, 6, length, dim), _moved(coded, where)

        both = partial(_joined, kernel, dim**-0.5), partial(_joined, reference, dim**-0.5)
        worst.append(choice.difference(*both, case, device, dtypes))
    return torch.tensor(worst, dtype=torch.float64).max().item()  # NaN if any is


def _joined(attend: Attend, scaling: float, query: Tensor, coded: CodedKV) -> Tensor:
    output, lse = attend(query, coded, scaling)
    return torch.cat([output.double(), lse.double().clamp(min=LOWEST)[..., None]], -1)


def _moved(coded: CodedKV, device: torch.device) -> CodedKV:
    """The block on a device; itself if it is there."""
    if coded.tiers[0].device == device:
        return coded

    def codes(own: Codes) -> Codes:
        return Codes(tuple(stream.to(device) for stream in own.streams), moved(own.scales), moved(own.groups))

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    tiers = tuple(replace(tier, keys=codes(tier.keys), values=codes(tier.values)) for tier in coded.tiers)
    books = None if coded.books is None else coded.books.to(device)
    means = moved(coded.key_means), moved(coded.value_means)
    return CodedKV(tiers, *means, books, coded.reading, moved(coded.rest_values))


def _block(dim: int, value_dim: int, reading: Reading) -> CodedKV:
    """Rows that are swapped, a head without entries, and rungs of all kinds."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    def books(width: int) -> Books:
        fine, residual = draw(2, width // 8, 256, 8), 0.3 * draw(2, width // 8, 256, 8)
        return Books(fine.half(), residual.half(), draw(2, width // 16, 256, 16).half() if width % 16 == 0 else None)

    coarse = ["pq16"] if dim % 16 == value_dim % 16 == 0 else []
    names = ["pr2", "rvq", "pq", "c3", "kivi2", *coarse]
    if dim < choice.NARROWEST and reading.share < 1:
        names = ["r2", "r3"]  # entries with the same index are many in so few bits, and which are read is chance
    placement = torch.randint(len(names) + 1, (2, 2, 300), generator=generator, device="cpu")
    placement[1, 0] = 0
    coder = Coder(tuple(RUNGS[name] for name in names), LayerBooks(books(dim), books(value_dim)), reading)
    vision = torch.ones(2, 300, dtype=torch.bool, device="cpu")
    coded = coder.encode(draw(2, 2, 300, dim), draw(2, 2, 300, value_dim), vision, placement.to(torch.uint8))
    assert coded is not None
    return coded.select((1, 0))
