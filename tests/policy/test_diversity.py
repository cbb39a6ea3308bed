# SPDX-License-Identifier: Apache-2.0
"""Diverse vision tokens: known answers, the naive quadratic choice in float64, and what holds for any features."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plphp.policy import distances, farthest
from plphp.policy.diversity import dpp, max_min

Choice = Callable[[Tensor, int], Tensor]
BOTH = pytest.mark.parametrize("choose", [max_min, dpp])
by_place = partial(max_min, euclidean=True)
ALL = pytest.mark.parametrize("choose", [max_min, dpp, by_place], ids=["max_min", "dpp", "by_place"])


def at(*degrees: float) -> Tensor:
    """Features in a plane, at these angles, each of another length."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(angles) + 1)[:, None]


def drawn(seed: int, tokens: int, dim: int) -> Tensor:
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def cosines_of(features: Tensor) -> Tensor:
    vectors = torch.nn.functional.normalize(features, dim=-1)
    return (vectors @ vectors.T).fill_diagonal_(1)


def naive_max_min(features: Tensor, keep: int, euclidean: bool = False) -> list[int]:
    """DivPrune's Algorithm 1 word by word."""
    distance = (torch.cdist(features, features) if euclidean else 1 - cosines_of(features)).tolist()
    tokens = range(len(distance))
    chosen = [max(tokens, key=lambda i: min(distance[i][j] for j in tokens if j != i))]
    while len(chosen) < keep:
        left = [i for i in tokens if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i][j] for j in chosen)))
    return sorted(chosen)


def naive_dpp(features: Tensor, relevance: Tensor, keep: int) -> list[int]:
    """Each next token makes the determinant of the kernel of the chosen the largest."""
    kernel = relevance[:, None] * cosines_of(features) * relevance
    chosen: list[int] = []
    while len(chosen) < keep:
        left = [i for i in range(len(kernel)) if i not in chosen]
        chosen.append(max(left, key=lambda i: kernel[[*chosen, i]][:, [*chosen, i]].slogdet().logabsdet.item()))
    return sorted(chosen)


@st.composite
def images(draw: st.DrawFn, wide: bool = False) -> tuple[Tensor, int]:
    """Features and a number to keep; wide ones have as many dimensions as tokens at least."""
    tokens = draw(st.integers(2, 24))
    dim = draw(st.integers(tokens, 40) if wide else st.integers(3, 40))
    return drawn(draw(st.integers(0, 2**32)), tokens, dim) + draw(st.sampled_from([0, 2])), draw(st.integers(1, tokens))


@pytest.fixture(params=[1, 3, 128])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rounds of few candidates, and cosines in small pieces: what is chosen does not depend on either."""
    monkeypatch.setattr(farthest, "TOGETHER", request.param)
    monkeypatch.setattr(distances, "AT_ONCE", 50 * request.param)
    return request.param


def test_max_min_by_hand() -> None:
    # Nearest others at 10, 10, 45, 45 and 165 degrees: 300 is first; of the rest 100 is the farthest from it, then 10.
    features = at(0, 10, 55, 100, 300)
    assert [kept(max_min(features, keep)) for keep in (1, 2, 3)] == [[4], [3, 4], [1, 3, 4]]
    assert kept(max_min(features, 5)) == [0, 1, 2, 3, 4]


def test_max_min_goes_by_the_angle_and_not_by_the_length() -> None:
    features = torch.tensor([[1.0, 0.0], [9.0, 0.0], [0.0, 0.1]])
    assert kept(max_min(features, 2)) == [0, 2]


def test_by_place_goes_by_length_and_not_by_what_is_in_common() -> None:
    features = torch.tensor([[1.0, 0.0], [9.0, 0.0], [1.0, 0.1], [0.9, 0.0]])
    assert kept(by_place(features, 1)) == [1]
    assert kept(by_place(features, 2)) == [1, 3]
    assert kept(by_place(features, 3)) == [1, 2, 3]
    # Seen from afar all directions are the same: the cosine, which is rounding there, chooses others.
    far = features.double() + 1e4
    assert [kept(by_place(far, keep)) for keep in (1, 2, 3)] == [[1], [1, 3], [1, 2, 3]]
    zeros = torch.cat([torch.zeros(2, 2), features])
    assert kept(by_place(zeros, 3)) == [0, 3, 4]


def test_max_min_takes_opposite_tokens_and_dpp_orthogonal_ones() -> None:
    features = at(0, 90, 181)
    assert kept(max_min(features, 2)) == [0, 2]
    assert kept(dpp(features, 2)) == [0, 1]


def test_of_a_pair_that_is_the_most_remote_the_earlier_is_first() -> None:
    features = at(0, 10, 100, 120)
    assert kept(max_min(features, 1)) == [2]
    assert kept(max_min(features.flip(0), 1)) == [0]


def test_dpp_by_hand() -> None:
    features = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]] + torch.tensor([0, 0.1, 0, 0])[:, None]
    assert kept(dpp(features, 3)) == [0, 2, 3]
    # 2.9 ** 2 for the second of two that are nearly alike is less than 1 ** 2 only with what the first leaves of it.
    relevance = torch.tensor([3.0, 2.9, 1.0, 0.9])
    assert [kept(dpp(features, keep, relevance)) for keep in (1, 2, 3)] == [[0], [0, 2], [0, 2, 3]]
    assert kept(dpp(features, 2, torch.tensor([0.1, 1.0, 0.1, 0.5]))) == [1, 3]


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("seed", range(4))
def test_the_naive_choice(seed: int) -> None:
    for tokens, dim in ((40, 50), (60, 8)):
        features = drawn(seed, tokens, dim) + seed
        for keep in (1, 2, 7, tokens // 2, tokens - 1):
            assert kept(max_min(features, keep)) == naive_max_min(features, keep)
            assert kept(by_place(features, keep)) == naive_max_min(features, keep, euclidean=True)


@settings(deadline=None, max_examples=60)
@given(images(wide=True), st.integers(0, 2**32), st.booleans())
def test_the_largest_determinant(image: tuple[Tensor, int], seed: int, by_relevance: bool) -> None:
    features, keep = image
    relevance = torch.ones(len(features), dtype=torch.float64)
    if by_relevance:
        relevance = 0.05 + torch.rand(len(features), generator=torch.Generator().manual_seed(seed)).double()
    given_relevance = relevance if by_relevance else None
    assert kept(dpp(features, keep, given_relevance)) == naive_dpp(features, relevance, keep)


@ALL
@settings(deadline=None)
@given(images(), st.integers(0, 2**32))
def test_any_number_and_what_is_kept_of_fewer(choose: Choice, image: tuple[Tensor, int], seed: int) -> None:
    features, keep = image
    mask = choose(features, keep)
    assert (mask.shape, mask.dtype) == ((len(features),), torch.bool)
    assert mask.sum() == keep
    assert torch.equal(choose(features, keep), mask)
    assert not (choose(features, int(1 + seed % keep)) & ~mask).any()


@settings(deadline=None)
@given(images(), st.integers(0, 2**32))
def test_the_order_of_the_tokens_does_not_matter(image: tuple[Tensor, int], seed: int) -> None:
    features, keep = image
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    relevance = 0.1 + torch.rand(len(features), generator=torch.Generator().manual_seed(seed)).double()
    farthest_off = cosines_of(features).fill_diagonal_(-9).amax(1).sort().values
    if farthest_off[1] - farthest_off[0] > 1e-9:  # else they are each the nearest of the other, and the first is taken
        assert torch.equal(max_min(features[order], keep), max_min(features, keep)[order])
    if keep <= features.shape[1]:
        assert torch.equal(dpp(features[order], keep, relevance[order]), dpp(features, keep, relevance)[order])


@ALL
@settings(deadline=None)
@given(st.integers(2, 14), st.integers(2, 30), st.integers(2, 4), st.sampled_from([torch.float32, torch.float64]))
def test_each_of_several_copies_is_taken_before_a_second(
    choose: Choice, different: int, rank: int, copies: int, dtype: torch.dtype
) -> None:
    """With more different tokens than their rank too, where every determinant is 0 but for rounding."""
    features = (drawn(different, different, rank) @ drawn(rank, rank, 32)).to(dtype).repeat(copies, 1)
    which = torch.arange(different).repeat(copies)
    for keep in (different - 1, different, different + 1):
        assert len(which[choose(features, keep)].unique()) == min(keep, different)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_tokens_alike(choose: Choice, dtype: torch.dtype) -> None:
    mask = choose(torch.ones(300, 16, dtype=dtype), 170)
    assert mask.sum() == 170


@pytest.mark.usefixtures("together")
def test_past_the_rank_dpp_goes_on_with_the_nearest_token() -> None:
    # 0 and 90 degrees use up the plane. The others are 38, 40 and 5 degrees away from the nearer of the two.
    features = at(0, 90, 38, 50, 5)
    assert [kept(dpp(features, keep)) for keep in (2, 3, 4)] == [[0, 1], [0, 1, 3], [0, 1, 2, 3]]
    # sin(5) is 0.087 and sin(40) is 0.643: 7.9 times the first is more.
    assert kept(dpp(features, 3, torch.tensor([9.0, 8.0, 1.0, 1.0, 7.9]))) == [0, 1, 4]
    # What is opposite to a chosen token is as dependent on it as what is alike.
    assert kept(dpp(at(0, 90, 178, 20), 3)) == [0, 1, 3]


def test_past_the_rank_tokens_of_one_plane_are_spread() -> None:
    features = at(*range(0, 180, 3)).float()
    degrees = 3 * dpp(features, 6).nonzero()[:, 0]
    assert torch.diff(degrees).min() >= 15


@pytest.mark.parametrize("scale", [1e-5, 1e-9])
def test_nearly_dependent_tokens_give_numbers(scale: float) -> None:
    features = (drawn(0, 400, 1) @ drawn(1, 1, 24) + scale * drawn(2, 400, 24)).float()
    relevance = torch.rand(400, generator=torch.Generator().manual_seed(0))
    for choose in (max_min, dpp, lambda x, keep: dpp(x, keep, relevance)):
        assert choose(features, 200).sum() == 200


def test_a_short_orthogonal_part_is_not_rounding() -> None:
    """Tokens that differ by ever less, down to 1e-4 of their length."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    features = torch.ones(12, 13, dtype=torch.float64)
    features[:, 1:] = torch.diag(torch.logspace(0, -4, 12, dtype=torch.float64))[order]
    assert kept(dpp(features, 9)) == naive_dpp(features, torch.ones(12, dtype=torch.float64), 9)


def test_tokens_without_relevance_come_last() -> None:
    features = drawn(0, 9, 20)
    relevance = torch.tensor([0.0, 0, 1, 0, 0.5, 0, 0.1, 0, 0])
    assert kept(dpp(features, 3, relevance)) == [2, 4, 6]
    assert dpp(features, 5, relevance).sum() == 5
    assert torch.equal(dpp(features, 5, torch.zeros(9)), dpp(features, 5))
    assert torch.equal(dpp(features, 5, 1e-30 * torch.ones(9)), dpp(features, 5))


@BOTH
def test_tokens_of_zeros_come_last(choose: Choice) -> None:
    features = drawn(0, 9, 5)
    whole = choose(features, 4)
    padded = torch.cat([torch.zeros(2, 5), features, torch.zeros(1, 5)])
    assert kept(choose(padded, 4)) == [2 + token for token in kept(whole)]
    assert kept(choose(padded, 10)) == [0, *range(2, 11)]
    assert kept(choose(torch.zeros(4, 5), 2)) == [0, 1]


@ALL
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_features_does_not_matter(choose: Choice, scale: float) -> None:
    features = drawn(0, 30, 40).float()
    assert torch.equal(choose(features * scale, 12), choose(features, 12))


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_16_bits_are_compared_in_float32(choose: Choice, dtype: torch.dtype) -> None:
    """Cosines that differ by less than bfloat16 can say: near 1 its steps are 1/256."""
    features = (1 + 0.1 * drawn(3, 200, 64)).to(dtype)
    expected = choose(features.double(), 60)
    assert torch.equal(choose(features, 60), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(choose(features, 60), expected)
    assert torch.equal(choose(features.float().requires_grad_(), 60), expected)


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest tensor holds that any call of torch gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return result


@ALL
def test_nothing_quadratic_is_held_of_many_tokens(choose: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "AT_ONCE", 2**16)
    monkeypatch.setattr(distances, "HELD", 2**20)
    tokens, dim = 3000, 24
    features = drawn(0, tokens, dim)
    with Largest() as largest:
        assert choose(features, tokens // 2).sum() == tokens // 2
    assert largest.numbers <= max(2**16, tokens * farthest.TOGETHER) < tokens**2 / 20
