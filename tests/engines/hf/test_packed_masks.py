# SPDX-License-Identifier: Apache-2.0
"""Masks of layers that do not get all tokens, against one entry at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plphp.engines.hf.packed_masks import packed_mask

CPU = torch.device("cpu")


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_every_pair_is_that_of_the_whole_mask(there: list[bool], data: st.DataObject) -> None:
    """Rows of unequal length, keys of which the mask knows the last alone, and queries that are the last keys."""
    end = len(there)
    other = data.draw(st.lists(st.booleans(), min_size=end, max_size=end))
    rows = [[place for place in range(end) if keep[place]] or [end - 1] for keep in (there, other)]
    keys = max(map(len, rows))
    columns = torch.tensor([[-1] * (keys - len(row)) + row for row in rows])
    queries = data.draw(st.integers(1, keys))
    begin = data.draw(st.integers(0, int(columns.where(columns >= 0, end).min())))
    whole = torch.rand(2, 1, end, end, generator=torch.Generator().manual_seed(0)) < 0.7
    whole |= torch.eye(end, dtype=torch.bool)
    low = torch.finfo(torch.float32).min
    own = whole[..., begin:]
    for mask in (None, own, torch.zeros(own.shape).masked_fill(~own, low)):
        result = packed_mask(mask, columns, queries, end, CPU)
        if result is None:
            assert mask is None
            assert (columns >= 0).all()
            continue
        assert result.shape == (2, 1, queries, keys)
        shown = result if result.dtype is torch.bool else result == 0
        for row in range(2):
            for query in range(queries):
                own_key = keys - queries + query
                asking = int(columns[row, own_key])
                for key in range(keys):
                    seen = int(columns[row, key])
                    expected = key == own_key
                    if asking >= 0 and seen >= 0:
                        expected = seen <= asking if mask is None else bool(whole[row, 0, asking, seen])
                    assert bool(shown[row, 0, query, key]) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_stays_finite_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    mask = torch.zeros(1, 1, 2, 4, dtype=dtype)
    result = packed_mask(mask, torch.tensor([[-1, 0, 2, 3], [0, 1, 2, 3]]), 2, 4, CPU)
    assert result is not None
    assert result.dtype is dtype
    assert result.isfinite().all()
    assert (result[0, 0] == 0).tolist() == [[False, True, True, True]] * 2
    assert (result[1, 0] == 0).all()


def test_what_fills_a_row_up_sees_itself_alone() -> None:
    result = packed_mask(None, torch.tensor([[-1, 2], [1, 2]]), 2, 3, CPU)
    assert result is not None
    assert result[:, 0].tolist() == [[[True, False], [False, True]], [[True, False], [True, True]]]


@pytest.mark.parametrize(
    "shown", [None, torch.ones(1, 1, 3, 3, dtype=torch.bool, device="meta")], ids=["causal", "mask"]
)
def test_it_is_where_the_queries_are(shown: torch.Tensor | None) -> None:
    """Attention on a GPU takes no mask on the CPU, as rows of equal length get it that keep different numbers."""
    meta = torch.device("meta")
    result = packed_mask(shown, torch.tensor([[-1, 2], [1, 2]]), 2, 3, meta)
    assert result is not None
    assert result.device == meta
