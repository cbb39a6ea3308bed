# SPDX-License-Identifier: Apache-2.0
"""What is chosen in rounds, by products of matrices, is what is chosen one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.policy import distances, farthest
from plphp.policy.distances import Distances
from plphp.policy.farthest import extended, most_remote

KINDS = {
    "cosine": lambda vectors: Distances.of_angles(vectors),
    "cosine, held": lambda vectors: Distances.of_angles(vectors, hold=True),
    "either way": lambda vectors: Distances.of_angles(vectors, either_way=True),
    "euclidean": lambda vectors: Distances.of_places(vectors),
}
"""Distances of unit vectors; the squared Euclidean ones are twice those by cosine."""


def naive(vectors: Tensor, worth: Tensor, chosen: list[int], count: int, kind: str) -> list[int]:
    """One at a time: the first of those with the largest worth times distance from the nearest that is chosen."""
    cosines = vectors @ vectors.T
    value = (worth[:, None] * (1 - (cosines.square() if kind == "either way" else cosines))).tolist()
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
@given(sets(), st.sampled_from(["cosine", "cosine, held", "either way"]), st.integers(1, 6), st.data())
def test_rounds_of_any_size_choose_the_same_in_the_same_order(
    together: int,
    monkeypatch: pytest.MonkeyPatch,
    given_set: tuple[Tensor, Tensor],
    kind: str,
    before: int,
    data: st.DataObject,
) -> None:
    monkeypatch.setattr(farthest, "TOGETHER", together)
    vectors, worth = given_set
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(before))[:before]
    count = data.draw(st.integers(len(chosen), len(vectors)))
    order = extended(KINDS[kind](vectors), worth, chosen, count)
    assert order.tolist() == naive(vectors, worth, chosen.tolist(), count, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_by_hand(kind: str) -> None:
    vectors = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0.6, 0.8]], dtype=torch.float64)
    cosines = torch.tensor([[1, 0, -1, 0.6], [0, 1, 0, 0.8], [-1, 0, 1, -0.6], [0.6, 0.8, -0.6, 1]]).double()
    expected = 1 - (cosines.square() if kind == "either way" else cosines)
    pairs = KINDS[kind](vectors)
    if kind == "euclidean":
        expected = 2 * expected
    assert len(pairs) == 4
    assert torch.allclose(pairs.between(slice(None), slice(None)), expected, rtol=0, atol=1e-7)
    assert torch.allclose(pairs.between(torch.tensor([3, 1]), slice(2, None)), expected[[3, 1]][:, 2:], atol=1e-7)


def test_places_are_those_of_features_of_any_length_and_with_anything_in_common() -> None:
    features = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(features, features).square()
    for scale, common in ((1.0, 0.0), (1e30, 0.0), (1e-30, 0.0), (1.0, 1e4)):
        own = Distances.of_places((features * scale + common * torch.ones(6)).float()).between(slice(None), slice(None))
        ratio = own[0, 1] / expected[0, 1]
        assert torch.allclose(
            own.double(), expected * ratio, rtol=2e-2 if common else 1e-4, atol=1e-4 * float(own.max())
        )
    alike = Distances.of_places(torch.zeros(3, 2))
    assert alike.between(slice(None), slice(None)).eq(0).all()


@pytest.mark.parametrize("at_once", [1, 40, 2**20])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets())
def test_the_most_remote_is_the_first_with_the_farthest_neighbour(
    at_once: int, monkeypatch: pytest.MonkeyPatch, given_set: tuple[Tensor, Tensor]
) -> None:
    monkeypatch.setattr(distances, "AT_ONCE", at_once)
    vectors = given_set[0]
    nearest = (vectors @ vectors.T).fill_diagonal_(-9).amax(1)
    index = most_remote(KINDS["cosine"](vectors))
    assert index == most_remote(KINDS["cosine, held"](vectors))
    assert nearest[index] <= nearest.min() + 1e-12
    assert (nearest[:index] > nearest[index] - 1e-12).all()
    if nearest.frac().eq(0).all():  # exact ones: of equal ones the first
        assert (nearest[:index] > nearest[index]).all()


def test_products_are_held_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(300, 5, dtype=torch.float64), dim=-1)
    for pairs in (Distances.of_angles(vectors, hold=True), Distances.of_places(vectors)):
        assert pairs.held is not None
        assert torch.allclose(pairs.held, pairs.vectors @ pairs.vectors.T, rtol=0, atol=1e-15)
        before = pairs.held.clone()
        most_remote(pairs)
        assert torch.equal(pairs.held, before)
    monkeypatch.setattr(distances, "HELD", 300**2 - 1)
    assert Distances.of_angles(vectors, hold=True).held is None
    assert Distances.of_places(vectors).held is None
    assert Distances.of_angles(vectors).held is None
