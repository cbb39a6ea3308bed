# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of coded entries, interpreted, against the reference in float64, which gets the same codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_coded_cpp import T10, block, queries
from torch import Tensor

from plphp.kernels.coded import CodedKV, Reading
from plphp.kernels.coded_attention import reference
from plphp.kernels.rungs import RUNGS

pytest.importorskip("triton")
from plphp.kernels import _coded_triton, _triton_shapes

DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_right(query: Tensor, coded: CodedKV, scaling: float = 0.1) -> None:
    output, lse = _coded_triton.attend(query, coded, scaling)
    expected, exact = reference(query.double(), coded, scaling)
    bound = DTYPES[query.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), exact, rtol=bound / 10, atol=bound)
    assert output.dtype == query.dtype
    assert output.is_contiguous()


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rungs(rung: str, dtype: torch.dtype) -> None:
    coded = block([rung], 32, seq=90)
    assert_right(queries(coded, 3, 1, 32, dtype), coded)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 128), (80, 40), (40, 256)])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_head_dimensions(dim: int, value_dim: int, share: float) -> None:
    coarse = ["pq16"] if dim % 16 == value_dim % 16 == 0 else []
    coded = block([*T10, *coarse, "c3", "kivi2", "r1"], dim, value_dim, reading=Reading(share), seq=100)
    assert_right(queries(coded, 2, 1, dim, torch.float32), coded, dim**-0.5)


@pytest.mark.parametrize("rung", RUNGS)
def test_recall_of_rungs(rung: str) -> None:
    """What a step reads is told by the first stream of the keys."""
    coded = block([rung], 32, reading=Reading(0.2), seq=100)
    assert_right(queries(coded, 3, 1, 32, torch.float32), coded)


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize(("group", "length"), [(1, 1), (7, 1), (5, 3)])
@pytest.mark.parametrize("share", [0.005, 0.2, 0.999])
def test_recall(share: float, group: int, length: int, rest: bool) -> None:
    """From the single entry of every head to all but one; every query chooses for itself."""
    coded = block(T10, 32, reading=Reading(share, rest), seq=100)
    assert_right(queries(coded, group, length, 32, torch.float32), coded)
