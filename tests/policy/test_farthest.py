# SPDX-License-Identifier: Apache-2.0
"""What is chosen in rounds, by products of matrices, is what is chosen one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.policy import farthest
from plphp.policy.farthest import all_cosines, extended, most_remote


def naive(vectors: Tensor, worth: Tensor, chosen: list[int], count: int, either_way: bool) -> list[int]:
    """One at a time: the first of those with the largest worth times distance from the nearest that is chosen."""
    cosines = vectors @ vectors.T
    value = (worth[:, None] * (1 - (cosines.square() if either_way else cosines))).tolist()
    chosen = list(chosen)
    while len(chosen) < count:
        left = [vector for vector in range(len(value)) if vector not in chosen]
        chosen.append(max(left, key=lambda vector: min(value[vector][other] for other in chosen)))
    return chosen


@st.composite
def sets(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Unit vectors whose cosines are 0, 1 and -1, nearly all of them ties; or any."""
    tokens, dim = draw(st.integers(2, 30)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        vectors = torch.eye(dim).repeat(2, 1)[torch.randint(2 * dim, (tokens,), generator=generator)]
        vectors = vectors * (2 * torch.randint(2, (tokens, 1), generator=generator) - 1)
        return vectors.double(), torch.randint(1, 4, (tokens,), generator=generator).double()
    vectors = torch.randn(tokens, 7, generator=generator).double()
    return torch.nn.functional.normalize(vectors, dim=-1), torch.rand(tokens, generator=generator).double()


@pytest.mark.parametrize("together", [1, 2, 5, 128])
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets(), st.booleans(), st.integers(1, 6), st.data())
def test_rounds_of_any_size_choose_the_same_in_the_same_order(
    together: int,
    monkeypatch: pytest.MonkeyPatch,
    given_set: tuple[Tensor, Tensor],
    either_way: bool,
    before: int,
    data: st.DataObject,
) -> None:
    monkeypatch.setattr(farthest, "TOGETHER", together)
    vectors, worth = given_set
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(before))[:before]
    count = data.draw(st.integers(len(chosen), len(vectors)))
    cosines = all_cosines(vectors) if data.draw(st.booleans()) else None
    order = extended(vectors, worth, chosen, count, either_way=either_way, cosines=cosines)
    assert order.tolist() == naive(vectors, worth, chosen.tolist(), count, either_way)


@pytest.mark.parametrize("at_once", [1, 40, 2**20])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets())
def test_the_most_remote_is_the_first_with_the_farthest_neighbour(
    at_once: int, monkeypatch: pytest.MonkeyPatch, given_set: tuple[Tensor, Tensor]
) -> None:
    monkeypatch.setattr(farthest, "AT_ONCE", at_once)
    vectors = given_set[0]
    nearest = (vectors @ vectors.T).fill_diagonal_(-9).amax(1)
    index = most_remote(vectors)
    assert index == most_remote(vectors, all_cosines(vectors))
    assert nearest[index] <= nearest.min() + 1e-12
    assert (nearest[:index] > nearest[index] - 1e-12).all()
    if nearest.frac().eq(0).all():  # exact ones: of equal ones the first
        assert (nearest[:index] > nearest[index]).all()


def test_cosines_are_held_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(300, 5, dtype=torch.float64), dim=-1)
    cosines = all_cosines(vectors)
    assert cosines is not None
    assert torch.allclose(cosines, vectors @ vectors.T, rtol=0, atol=1e-15)
    before = cosines.clone()
    most_remote(vectors, cosines)
    assert torch.equal(cosines, before)
    monkeypatch.setattr(farthest, "HELD", 300**2 - 1)
    assert all_cosines(vectors) is None
