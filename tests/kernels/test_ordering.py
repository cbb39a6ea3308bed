# SPDX-License-Identifier: Apache-2.0
"""The order of scores is torch's stable one, whichever way it is found."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plphp.kernels.ordering import falling_order, positions_in_order

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 1e-45, -1e-45, 3e38, -3e38]),
    st.floats(width=32, allow_nan=False),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(NUMBERS, min_size=0, max_size=60), st.integers(1, 3))
def test_it_is_the_stable_order(numbers: list[float], rows: int) -> None:
    score = torch.tensor([numbers] * rows, dtype=torch.float32).view(rows, len(numbers))
    score = torch.stack([row.roll(number) for number, row in enumerate(score)]) if numbers else score
    expected = score.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(falling_order(score), expected)
    assert torch.equal(falling_order(score.double()), expected)


def test_a_view_and_a_score_with_a_gradient_are_put_in_order() -> None:
    score = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    expected = score.T.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(falling_order(score.T), expected)
    assert torch.equal(falling_order(score.T.clone().requires_grad_()), expected)


def test_what_is_no_candidate_stands_behind_all() -> None:
    score = torch.tensor([[[0.5, 2.0, 1.0, 2.0]]])
    candidates = torch.tensor([[True, False, True, True]])
    assert positions_in_order(score, candidates).tolist() == [[[2, 4, 1, 0]]]
