# SPDX-License-Identifier: Apache-2.0
"""`PrunedLayer` against a list of entries per row and head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_packed import entries_of
from torch import Tensor

from plphp import UnsupportedFeatureError
from plphp.engines.hf.layer import PrunedLayer
from plphp.pruning.placement import whole_or_dropped

KEY_DIM, VALUE_DIM = 3, 2

Entry = tuple[Tensor, Tensor]


class LayerMachine(RuleBasedStateMachine):
    """Anything that transformers does with a cache layer, in any order."""

    @initialize(rows=st.integers(1, 3), kv_heads=st.integers(1, 2), seed=st.integers(0, 2**32))
    def start(self, rows: int, kv_heads: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layer = PrunedLayer()
        self.kv_heads = kv_heads
        self.fresh = rows
        self.prefix: list[list[list[Entry]]] = []  # [row][head][entry]
        self.tail: list[list[list[Entry]]] = []
        self.prefix_length = 0
        self.compacted = False

    @property
    def tail_length(self) -> int:
        return len(self.tail[0][0]) if self.tail else 0

    @rule(new=st.integers(1, 20) | st.just(1))
    def update(self, new: int) -> None:
        if not self.tail:
            self.tail = [[[] for _ in range(self.kv_heads)] for _ in range(self.fresh)]
            self.prefix = [[[] for _ in range(self.kv_heads)] for _ in range(self.fresh)]
        shape = (len(self.tail), self.kv_heads, new)
        keys = torch.randn(*shape, KEY_DIM, generator=self.generator)
        values = torch.randn(*shape, VALUE_DIM, generator=self.generator)
        for row, heads in enumerate(self.tail):
            for head, entries in enumerate(heads):
                entries += [(keys[row, head, i].clone(), values[row, head, i].clone()) for i in range(new)]
        got_keys, got_values = self.layer.update(keys, values)
        assert got_keys.shape == (len(self.tail), self.kv_heads, self.tail_length, KEY_DIM)
        assert got_values.shape == (len(self.tail), self.kv_heads, self.tail_length, VALUE_DIM)

    @precondition(lambda self: self.tail_length > 0)
    @rule(chance=st.sampled_from([0.0, 0.5, 1.0]))
    def compact(self, chance: float) -> None:
        shape = (len(self.tail), self.kv_heads, self.tail_length)
        keep = torch.rand(shape, generator=self.generator) < chance
        for row, heads in enumerate(self.tail):
            for head, entries in enumerate(heads):
                self.prefix[row][head] += [entry for i, entry in enumerate(entries) if keep[row, head, i]]
                heads[head] = []
        self.prefix_length += shape[2]
        self.compacted = True
        self.layer.compact(whole_or_dropped(keep))
        assert self.layer.keys is None
        assert self.layer.values is None

    @precondition(lambda self: self.tail)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, self.tail_length))
        for heads in self.tail:
            for entries in heads:
                del entries[len(entries) - count :]
        self.layer.crop(-count)

    @precondition(lambda self: self.tail)
    @rule(beyond=st.integers(1, 5))
    def crop_into_the_prefix_is_refused(self, beyond: int) -> None:
        with pytest.raises(UnsupportedFeatureError, match=f"last {self.tail_length + beyond} tokens"):
            self.layer.crop(-self.tail_length - beyond)

    @precondition(lambda self: self.tail)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.tail) - 1), min_size=1, max_size=4))
        self.take(rows)
        self.layer.reorder_cache(torch.tensor(rows))

    @precondition(lambda self: self.tail)
    @rule(data=st.data())
    def select_by_mask(self, data: st.DataObject) -> None:
        mask = data.draw(st.lists(st.booleans(), min_size=len(self.tail), max_size=len(self.tail)))
        if any(mask):
            self.take([row for row, wanted in enumerate(mask) if wanted])
            self.layer.batch_select_indices(torch.tensor(mask))

    @precondition(lambda self: 0 < len(self.tail) < 5)
    @rule(times=st.integers(1, 2))
    def repeat(self, times: int) -> None:
        self.take([row for row in range(len(self.tail)) for _ in range(times)])
        self.layer.batch_repeat_interleave(times)

    @rule()
    def reset(self) -> None:
        self.fresh = len(self.tail) or self.fresh
        self.prefix, self.tail, self.prefix_length, self.compacted = [], [], 0, False
        self.layer.reset()

    def take(self, rows: list[int]) -> None:
        self.tail, self.prefix = (
            [[list(entries) for entries in held[row]] for row in rows] for held in (self.tail, self.prefix)
        )

    @invariant()
    def lengths(self) -> None:
        layer = self.layer
        assert layer.get_seq_length() == self.prefix_length + self.tail_length
        assert (layer.prefix_length, layer.tail_length) == (self.prefix_length, self.tail_length)
        assert layer.get_mask_sizes(7) == (self.tail_length + 7, self.prefix_length)
        if self.tail_length or self.compacted:
            assert layer.batch_size == len(self.tail)
        size = (KEY_DIM + VALUE_DIM) * 4
        assert layer.full_nbytes == len(self.tail) * self.kv_heads * layer.get_seq_length() * size

    @invariant()
    def entries(self) -> None:
        if self.compacted:
            assert self.layer.prefix is not None
            for row, heads in enumerate(self.prefix):
                for head, expected in enumerate(heads):
                    self.same(*entries_of(self.layer.prefix, row, head), expected)
        else:
            assert self.layer.prefix is None
        if self.tail_length:
            keys, values = self.layer.tail()
            for row, heads in enumerate(self.tail):
                for head, expected in enumerate(heads):
                    self.same(keys[row, head], values[row, head], expected)

    @staticmethod
    def same(keys: Tensor, values: Tensor, entries: list[Entry]) -> None:
        assert torch.equal(keys, torch.stack([key for key, _ in entries]) if entries else torch.empty(0, KEY_DIM))
        assert torch.equal(
            values, torch.stack([value for _, value in entries]) if entries else torch.empty(0, VALUE_DIM)
        )

    @invariant()
    def bytes(self) -> None:
        holders = [self.layer] + ([self.layer.prefix] if self.layer.prefix is not None else [])
        tensors = [t for holder in holders for t in (holder.keys, holder.values) if t is not None]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert self.layer.nbytes == sum(storages.values())


TestLayer = LayerMachine.TestCase
TestLayer.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def filled(tokens: int = 3) -> PrunedLayer:
    layer = PrunedLayer()
    layer.update(torch.randn(1, 1, tokens, 2), torch.randn(1, 1, tokens, 2))
    return layer


def test_a_prompt_is_held_without_a_copy() -> None:
    layer, keys, values = PrunedLayer(), torch.randn(1, 2, 5, 3), torch.randn(1, 2, 5, 3)
    got_keys, got_values = layer.update(keys, values)
    assert got_keys.data_ptr() == keys.data_ptr()
    assert got_values.data_ptr() == values.data_ptr()


def test_the_tail_grows_rarely() -> None:
    layer, storages = filled(), set()
    layer.compact(whole_or_dropped(torch.ones(1, 1, 3, dtype=torch.bool)))
    for _ in range(200):
        layer.update(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 2))
        assert layer.keys is not None
        storages.add(layer.keys.data_ptr())
    assert len(storages) < 15
    # The room that is reserved is small beside what is stored.
    assert layer.keys.shape[2] <= 200 + max(16, 200 // 8)


def test_crop_takes_a_negative_number() -> None:
    with pytest.raises(ValueError, match="negative number of tokens to remove, got 2"):
        filled().crop(2)


def test_an_empty_layer() -> None:
    layer = PrunedLayer()
    assert (layer.batch_size, layer.nbytes, layer.full_nbytes, layer.get_seq_length()) == (-1, 0, 0, 0)
    assert layer.get_max_length() == -1
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.batch_size == -1


@pytest.mark.parametrize("name", ["offload", "prefetch"])
def test_offloading_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match="offloaded"):
        getattr(filled(), name)()
