# SPDX-License-Identifier: Apache-2.0
"""The vision tokens with the highest scores: single ones, whole rows, and by the sum over layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plphp.policy.top_tokens import top, top_over_layers, top_rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


@DTYPES
def test_of_equal_scores_the_earlier_is_kept(dtype: torch.dtype) -> None:
    scores = torch.tensor([0, 2, 1, 2, 1, 1], dtype=dtype)
    assert top(scores, 3).tolist() == [False, True, True, True, False, False]
    assert top(torch.zeros(400, dtype=dtype), 150).nonzero()[:, 0].tolist() == list(range(150))


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_top_is_the_naive_choice(scores: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:keep])
    assert top(torch.tensor(scores).double(), keep).nonzero()[:, 0].tolist() == expected


def test_rows_go_by_their_sum_and_the_last_is_cut_to_its_best() -> None:
    scores = torch.tensor([[9.0, 0, 0], [3, 2, 5], [4, 4, 4], [1, 0, 1]])
    rows = [top_rows(scores.flatten(), (4, 3), keep).view(4, 3).int().tolist() for keep in (3, 5, 7)]
    assert rows[0] == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert rows[1] == [[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]]
    assert rows[2] == [[1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_of_equal_rows_the_upper_is_kept_and_of_equal_scores_in_the_cut_the_left() -> None:
    assert top_rows(torch.ones(12), (4, 3), 5).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32), st.data())
def test_rows_are_exact_in_number_and_the_best(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, rows * columns))
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = top_rows(scores.flatten(), (rows, columns), keep).view(rows, columns)
    assert kept.sum() == keep
    whole, sums = kept.all(1), scores.sum(1)
    assert (kept.any(1) & ~whole).sum() <= 1
    if whole.any() and not whole.all():
        assert sums[whole].min() >= sums[~whole].max()


def test_one_row_or_one_column_is_top() -> None:
    scores = torch.rand(30, generator=torch.Generator().manual_seed(0))
    for grid in ((1, 30), (30, 1)):
        assert torch.equal(top_rows(scores, grid, 11), top(scores, 11))


def test_layers_are_added() -> None:
    scores = torch.tensor([[5.0, 0, 3, 0], [0, 0, 3, 4], [0, 0, 0, 3]])
    assert top_over_layers(scores, 2).tolist() == [False, False, True, True]
    assert torch.equal(top_over_layers(scores[:1], 2), top(scores[0], 2))


def test_sums_of_16_bits_are_taken_in_32() -> None:
    """In bfloat16 256 + 1 is 256: all sums would be equal, and the first tokens kept."""
    scores = torch.tensor([[256.0, 256, 256], [0, 0, 1], [0, 0, 0]], dtype=torch.bfloat16)
    assert top_over_layers(scores, 1).tolist() == [False, False, True]
    assert top_rows(scores.T.flatten(), (3, 3), 3).view(3, 3).any(1).tolist() == [False, False, True]


def test_scores_with_a_gradient_are_taken() -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert top(scores[0], 2).sum() == top_rows(scores[0], (2, 3), 2).sum() == top_over_layers(scores, 2).sum() == 2
