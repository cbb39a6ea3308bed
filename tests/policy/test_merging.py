# SPDX-License-Identifier: Apache-2.0
"""Vision tokens that take others in: VisionZip's contextual tokens, and the means of pooling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.policy import merging
from plphp.policy.merging import pool, visionzip


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_visionzip_by_hand() -> None:
    features = torch.tensor([[1.0], [10], [100], [1000], [10000], [100000], [1000000]])
    keys = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0.1, 1], [0, 2], [1, 0.1], [1, 0]])
    scores = torch.tensor([0.0, 0, 9, 0, 0, 0, 8])
    # Dominant: 2 and 6. Of 0, 1, 3, 4, 5 the tokens 0 and 3 are contextual; 1 and 4 go to 3, 5 to 0.
    kept, merged = visionzip(features, keys, scores, 2, 2)
    assert kept.nonzero()[:, 0].tolist() == [0, 2, 3, 6]
    assert merged[:, 0].tolist() == [1 + 100000, 100, 1000 + (10 + 10000) / 2, 1000000]


def naive_visionzip(
    features: Tensor, keys: Tensor, scores: Tensor, dominant: int, contextual: int
) -> dict[int, Tensor]:
    order = sorted(range(len(scores)), key=lambda token: (-float(scores[token]), token))
    best, rest = order[:dominant], sorted(order[dominant:])
    targets = [rest[int(number * len(rest) / contextual + 1e-9)] for number in range(contextual)]
    taken: dict[int, list[Tensor]] = {target: [] for target in targets}
    for token in set(rest) - set(targets):
        near = [torch.nn.functional.cosine_similarity(keys[token], keys[target], dim=0).item() for target in targets]
        if targets:
            taken[targets[near.index(max(near))]].append(features[token])
    result = {token: features[token] for token in best}
    for target, others in taken.items():
        result[target] = features[target] + (torch.stack(others).mean(0) if others else 0)
    return result


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32), st.data())
def test_visionzip_is_the_naive_one(tokens: int, dim: int, seed: int, data: st.DataObject) -> None:
    features, keys, scores = drawn(seed, tokens, dim), drawn(seed + 1, tokens, dim), drawn(seed + 2, tokens)
    dominant = data.draw(st.integers(0, tokens))
    contextual = data.draw(st.integers(0 if dominant else 1, tokens - dominant))
    kept, merged = visionzip(features, keys, scores, dominant, contextual)
    expected = naive_visionzip(features, keys, scores, dominant, contextual)
    assert kept.nonzero()[:, 0].tolist() == sorted(expected)
    torch.testing.assert_close(merged, torch.stack([expected[token] for token in sorted(expected)]))


def test_contextual_tokens_are_spread_over_the_image() -> None:
    """150 of which 100 are taken: a step of whole tokens would take the first 100."""
    kept, _ = visionzip(drawn(0, 150, 4), drawn(1, 150, 4), drawn(2, 150), 0, 100)
    assert torch.diff(kept.nonzero()[:, 0]).max() == 2


def test_tokens_are_assigned_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = drawn(0, 90, 4), drawn(1, 90, 6), drawn(2, 90)
    whole = visionzip(*inputs, 10, 7)
    monkeypatch.setattr(merging, "AT_ONCE", 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, visionzip(*inputs, 10, 7), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_features_are_rounded_once(dtype: torch.dtype) -> None:
    features, keys, scores = drawn(0, 200, 8).to(dtype), drawn(1, 200, 4).to(dtype), drawn(2, 200).to(dtype)
    kept, merged = visionzip(features, keys, scores, 20, 5)
    exact = visionzip(features.double(), keys.double(), scores.double(), 20, 5)
    assert torch.equal(kept, exact[0])
    assert torch.equal(merged, exact[1].to(dtype))
    kept, pooled = pool(features, (20, 10), 0.25)
    assert torch.equal(pooled, pool(features.double(), (20, 10), 0.25)[1].to(dtype))


def test_what_is_given_stays_as_it_was() -> None:
    features = drawn(0, 40, 3)
    before = features.clone()
    visionzip(features, features, drawn(1, 40), 5, 5)
    pool(features, (5, 8), 0.3)
    assert torch.equal(features, before)


def test_pooling_by_hand() -> None:
    image = torch.arange(24.0).view(4, 6)
    kept, pooled = pool(image.flatten()[:, None], (4, 6), 0.25)
    assert pooled[:, 0].tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]
    assert kept.nonzero()[:, 0].tolist() == [0, 2, 4, 12, 14, 16]
    # Nine places in the middle of which one stays: 3 x 3 cells.
    kept, pooled = pool(torch.arange(36.0)[:, None], (6, 6), 1 / 9)
    assert kept.nonzero()[:, 0].tolist() == [7, 10, 25, 28]
    assert pooled[:, 0].tolist() == [7, 10, 25, 28]


@pytest.mark.parametrize(
    ("grid", "share", "remain"),
    [
        *[((14, 14), 0.5, 100), ((14, 14), 0.25, 49), ((14, 14), 0.1, 20), ((24, 24), 0.11, 64), ((14, 14), 1.0, 196)],
        # Not square: a cell is as wide as the image, and the other side meets the share.
        *[((100, 2), 0.1, 20), ((2, 100), 0.1, 20), ((1, 50), 0.3, 15), ((50, 1), 0.3, 15), ((3, 3), 0.001, 1)],
    ],
)
def test_how_many_remain(grid: tuple[int, int], share: float, remain: int) -> None:
    kept, pooled = pool(torch.ones(grid[0] * grid[1], 2), grid, share)
    assert kept.sum() == len(pooled) == remain


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 1))
def test_cells_are_nearly_square_cover_the_image_and_meet_the_share(rows: int, columns: int, share: float) -> None:
    features = drawn(rows, rows * columns, 2)
    kept, pooled = pool(features, (rows, columns), share)
    cells = kept.view(rows, columns)
    down, across = int(cells.any(1).sum()), int(cells.any(0).sum())
    assert down * across == cells.sum() == len(pooled)
    target = share * rows * columns
    assert abs(down * across - target) <= 0.5 * max(down, across) or down * across == 1
    if min(rows, columns) * share**0.5 >= 2:
        assert 1 / 3 <= (rows / down) / (columns / across) <= 3
    # The mean of each cell, found from the middles: places belong to the cell that begins last before them.
    number = [[i * side // count for i in range(count + 1)] for side, count in ((rows, down), (columns, across))]
    image = features.view(rows, columns, 2)
    expected = [
        image[top:bottom, left:right].flatten(0, 1).mean(0)
        for top, bottom in zip(number[0], number[0][1:], strict=False)
        for left, right in zip(number[1], number[1][1:], strict=False)
    ]
    torch.testing.assert_close(pooled, torch.stack(expected))


def test_all_tokens_stay_as_they_are_at_a_share_of_1() -> None:
    features = drawn(0, 35, 3)
    kept, pooled = pool(features, (5, 7), 1)
    assert kept.all()
    assert torch.equal(pooled, features)
