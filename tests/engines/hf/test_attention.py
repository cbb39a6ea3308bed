# SPDX-License-Identifier: Apache-2.0
"""The mask of tokens that have left the prompt, against one entry at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plphp.engines.hf.hiding import hide


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_hidden_entries_are_seen_by_themselves_alone(hidden: list[bool], data: st.DataObject) -> None:
    tail = len(hidden)
    length = data.draw(st.integers(1, tail))
    left = torch.tensor([hidden, hidden[::-1]])
    own = torch.rand(2, 1, length, tail, generator=torch.Generator().manual_seed(0)) < 0.7
    low = torch.finfo(torch.float32).min
    masks = [None, own, torch.zeros(own.shape).masked_fill(~own, low)]
    for mask in masks:
        result = hide(mask, left, length)
        assert result.shape == (2, 1, length, tail)
        shown = result if result.dtype is torch.bool else result == 0
        for row in range(2):
            for query in range(length):
                position = tail - length + query
                for key in range(tail):
                    before = key <= position if mask is None else bool(own[row, 0, query, key])
                    assert bool(shown[row, 0, query, key]) == (before and (not left[row, key] or key == position))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_stays_finite_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    result = hide(torch.zeros(1, 1, 2, 4, dtype=dtype), torch.tensor([[True, False, True, False]]), 2)
    assert result.dtype is dtype
    assert result.isfinite().all()
    assert (result[0, 0] == 0).tolist() == [[False, True, True, True], [False, True, False, True]]
