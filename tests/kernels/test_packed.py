# SPDX-License-Identifier: Apache-2.0
"""`PackedKV` against lists of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.kernels import compact_kv
from plphp.kernels.packed import PackedKV

KEY_DIM, VALUE_DIM = 3, 2

Model = list[list[tuple[Tensor, Tensor]]]
"""``[row][head]``: keys [kept, dim] and values."""

counts = st.tuples(st.integers(1, 4), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 4), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)
equal_counts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 3)).map(
    lambda shape: [[shape[2]] * shape[1]] * shape[0]
)
seeds = st.integers(0, 2**32)


def make(numbers: list[list[int]], seed: int) -> tuple[PackedKV, Model]:
    generator = torch.Generator().manual_seed(seed)
    model = [
        [(torch.randn(n, KEY_DIM, generator=generator), torch.randn(n, VALUE_DIM, generator=generator)) for n in row]
        for row in numbers
    ]
    keys, values = (torch.cat([pair[i] for row in model for pair in row]) for i in (0, 1))
    packed = PackedKV(keys, values, tuple(map(tuple, numbers)), tuple(range(len(numbers))))
    return packed, model


def assert_is(packed: PackedKV, model: Model) -> None:
    assert packed.batch == len(model)
    assert packed.kv_heads == len(model[0])
    for row, expected in enumerate(model):
        actual: dict[int, tuple[Tensor, Tensor]] = {}
        for heads, (keys, values) in packed.row(row):
            assert keys.shape[::2] == (heads.stop - heads.start, KEY_DIM)
            assert values.shape[::2] == (heads.stop - heads.start, VALUE_DIM)
            actual |= {head: (keys[i], values[i]) for i, head in enumerate(range(heads.start, heads.stop))}
        assert sorted(actual) == list(range(len(expected)))
        for head, (keys, values) in enumerate(expected):
            assert torch.equal(actual[head][0], keys)
            assert torch.equal(actual[head][1], values)
    if packed.dense is not None:
        keys, values = packed.dense
        for row, expected in enumerate(model):
            for head, pair in enumerate(expected):
                assert torch.equal(keys[row, head], pair[0])
                assert torch.equal(values[row, head], pair[1])


@settings(deadline=None)
@given(counts | equal_counts, seeds)
def test_rows_are_views_on_the_stored_entries(numbers: list[list[int]], seed: int) -> None:
    packed, model = make(numbers, seed)
    assert_is(packed, model)
    assert packed.nbytes == sum(map(sum, numbers)) * (KEY_DIM + VALUE_DIM) * 4
    assert (packed.dense is not None) == (len({n for row in numbers for n in row}) == 1)
    for row in range(packed.batch):
        for _, (keys, _) in packed.row(row):
            assert keys.untyped_storage().data_ptr() == packed.keys.untyped_storage().data_ptr()


@settings(deadline=None)
@given(counts | equal_counts, seeds, st.data())
def test_select_and_append(numbers: list[list[int]], seed: int, data: st.DataObject) -> None:
    packed, model = make(numbers, seed)
    for _ in range(data.draw(st.integers(1, 3))):
        rows = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=4))
        packed, model = packed.select(rows), [model[row] for row in rows]
        assert_is(packed, model)
        # Nothing that no row reads is stored.
        assert packed.keys.shape[0] == sum(len(keys) for row in {id(r): r for r in model}.values() for keys, _ in row)
        if data.draw(st.booleans()):
            more = data.draw(
                st.lists(
                    st.lists(st.integers(0, 3), min_size=len(numbers[0]), max_size=len(numbers[0])),
                    min_size=len(model),
                    max_size=len(model),
                )
            )
            block, added = make(more, seed + 1)
            packed = packed.appended(block)
            model = [
                [(torch.cat([k1, k2]), torch.cat([v1, v2])) for (k1, v1), (k2, v2) in zip(own, newer, strict=True)]
                for own, newer in zip(model, added, strict=True)
            ]
            assert_is(packed, model)
            assert packed.keys.untyped_storage().nbytes() == packed.keys.nbytes


def test_repeated_rows_share_their_entries_and_free_those_of_lost_rows() -> None:
    packed, _ = make([[2, 1], [3, 0], [1, 1]], 0)
    same = packed.select([0, 0, 1, 2])
    assert same.keys is packed.keys
    fewer = packed.select([1, 1])
    assert fewer.keys.shape[0] == 3
    assert fewer.counts == ((3, 0),)


def test_counts_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="counts add up to 3 entries, but there are 4"):
        PackedKV(torch.zeros(4, 2), torch.zeros(4, 2), ((1, 2),), (0,))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 4), st.data())
def test_rows_picked_from_one_row(heads: int, seq: int, rows: int, data: st.DataObject) -> None:
    packed, [row] = make([[seq] * heads], 0)
    bits = data.draw(st.lists(st.booleans(), min_size=rows * heads * seq, max_size=rows * heads * seq))
    keep = torch.tensor(bits, dtype=torch.bool).view(rows, heads, seq)
    below = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=heads, max_size=heads), min_size=not rows, max_size=2)
    )
    blocks = [make([numbers], 1 + i) for i, numbers in enumerate(below)]
    picked = packed.picked(keep, [block for block, _ in blocks])
    expected = [[(keys[mask], values[mask]) for (keys, values), mask in zip(row, masks, strict=True)] for masks in keep]
    assert_is(picked, expected + [model for _, [model] in blocks])
    assert picked.keys.untyped_storage().nbytes() == picked.keys.nbytes


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), seeds)
def test_narrowed_blocks(rows: int, heads: int, seq: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, heads, seq, dim, generator=generator) for dim in (KEY_DIM, VALUE_DIM))
    held, keep = (torch.rand(rows, heads, seq, generator=generator) < share for share in (0.7, 0.6))
    keep &= held
    narrowed = compact_kv(keys, values, held).narrowed(held, keep)
    assert_is(narrowed, [
        [(keys[row, head][keep[row, head]], values[row, head][keep[row, head]]) for head in range(heads)]
        for row in range(rows)
    ])  # fmt: skip
