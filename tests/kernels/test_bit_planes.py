# SPDX-License-Identifier: Apache-2.0
"""Bit planes: what is packed comes back, and every bit lies where the C++ and Triton kernels look for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plphp.kernels.bit_planes import pack_planes, unpack_planes


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**32))
def test_codes_come_back(bits: int, entries: int, parts: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (entries, 8 * parts), generator=torch.Generator().manual_seed(seed))
    planes = pack_planes(codes, bits)
    assert [(plane.dtype, tuple(plane.shape)) for plane in planes] == [(torch.uint8, (entries, parts))] * bits
    assert torch.equal(unpack_planes(planes), codes.int())
    if bits > 1:  # the first planes alone are the codes without their last bits
        assert torch.equal(unpack_planes(planes[:1]), codes.int() >> (bits - 1))


@pytest.mark.parametrize("channel", [0, 1, 7, 8, 13])
def test_where_a_bit_lies(channel: int) -> None:
    codes = torch.zeros(1, 16, dtype=torch.int32)
    codes[0, channel] = 0b100
    highest, middle, lowest = pack_planes(codes, 3)
    expected = torch.zeros(1, 2, dtype=torch.uint8)
    expected[0, channel // 8] = 2 ** (channel % 8)
    assert torch.equal(highest, expected)
    assert not middle.any()
    assert not lowest.any()
