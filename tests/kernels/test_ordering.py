# SPDX-License-Identifier: Apache-2.0
"""Positions in order against sorting with Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.kernels.ordering import positions_in_order

shapes = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 40))
"""Batch, heads and entries; from some 20 entries on torch has another sort where none is asked to be stable."""


def naive(scores: list[float], candidates: list[bool]) -> list[int]:
    """Python's sort is stable, too."""
    order = sorted((entry for entry, shown in enumerate(candidates) if shown), key=lambda entry: -scores[entry])
    return [order.index(entry) if shown else len(scores) for entry, shown in enumerate(candidates)]


def draw_scores(data: st.DataObject, shape: tuple[int, ...]) -> Tensor:
    """Few different numbers, so that many are equal."""
    count = torch.Size(shape).numel()
    numbers = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=count, max_size=count))
    return torch.tensor(numbers).view(shape)


@settings(deadline=None)
@given(shapes, st.data())
def test_positions_are_those_of_a_stable_sort(shape: tuple[int, int, int], data: st.DataObject) -> None:
    score = draw_scores(data, shape)
    positions = positions_in_order(score)
    assert positions.dtype == torch.int64
    for row in range(shape[0]):
        for head in range(shape[1]):
            assert positions[row, head].tolist() == naive(score[row, head].tolist(), [True] * shape[2])


@settings(deadline=None)
@given(shapes, st.integers(1, 3), st.data())
def test_candidates_alone_are_in_the_order(shape: tuple[int, int, int], queries: int, data: st.DataObject) -> None:
    """Also where there are axes between the heads and the entries."""
    batch, heads, seq = shape
    score = draw_scores(data, (batch, heads, queries, seq))
    candidates = draw_scores(data, (batch, queries, seq)) > 0
    positions = positions_in_order(score, candidates)
    for row in range(batch):
        for head in range(heads):
            for query in range(queries):
                expected = naive(score[row, head, query].tolist(), candidates[row, query].tolist())
                assert positions[row, head, query].tolist() == expected
