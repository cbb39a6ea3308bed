# SPDX-License-Identifier: Apache-2.0
"""Heads that hold different numbers of entries: every path against naive float64 attention, and no loop over heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import KEY_DIM, SCALING, TOLERANCE, VALUE_DIM, by_cpp, noise
from test_packed import entries_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plphp.kernels import choice, compact_kv, decode, decode_attention, head_groups, window_scores
from plphp.kernels.head_groups import ALONE, FEW
from plphp.kernels.packed import PackedKV

GROUP = 2
PATHS = ["torch", "fused", "triton", "C++"]
"""The reference (values narrower than keys), torch's fused kernel, the Triton kernels interpreted, the C++ kernel."""


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(choice, "unsupported_by_triton", lambda *_: None)
        monkeypatch.setattr(choice, "trouble", lambda *_: None)
    if name == "C++":
        monkeypatch.setattr(decode, "_by_torch", by_cpp(decode._by_torch))
    return name


def block(counts: list[list[int]], rows: list[int], seed: int, value_dim: int = KEY_DIM) -> PackedKV:
    """Random entries of stored rows, of which the rows of a batch read some."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(sum, counts))
    keys, values = noise(generator, total, KEY_DIM), noise(generator, total, value_dim)
    return PackedKV(keys, values, tuple(map(tuple, counts)), tuple(rows))


def naive(query: Tensor, prefix: PackedKV, tail: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
    """Float64 attention [batch, query, q_heads, dim]; visible is bool [batch, q_heads, query, tail]."""
    out = query.new_zeros(*query.shape[:3], tail[1].shape[-1], dtype=torch.float64)
    for row in range(query.shape[0]):
        for head in range(query.shape[1]):
            old = entries_of(prefix, row, head // GROUP)
            keys, values = (torch.cat([a, b[row, head // GROUP]]).double() for a, b in zip(old, tail, strict=True))
            logits = query[row, head].double() @ keys.T * SCALING
            logits[:, len(old[0]) :].masked_fill_(~visible[row, head], -torch.inf)
            out[row, head] = logits.softmax(-1) @ values
    return out.transpose(1, 2)


small = st.integers(0, 40)
many = st.sampled_from([0, 0, 1, ALONE - 1, ALONE, 2 * ALONE + 3])


@st.composite
def ragged(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Entries of stored rows and heads, at times none or many, and rows that read them: swapped, left out, shared."""
    heads, stored = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    row = st.lists(draw(st.sampled_from([small, small | many])), min_size=heads, max_size=heads)
    counts = draw(st.lists(row, min_size=stored, max_size=stored))
    rows = draw(st.lists(st.integers(0, stored - 1), min_size=1, max_size=4))
    return counts, rows


TWO_PATHS = pytest.mark.parametrize("path", ["torch", "triton"], indirect=True)
"""Of what has no other kernel."""
EXAMPLES = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@EXAMPLES
@given(ragged(), st.integers(1, 5), st.integers(0, 3), st.sampled_from([None, "row", "head"]), st.integers(0, 2**32))
def test_attention_over_ragged_heads(
    path: str, drawn: tuple[list[list[int]], list[int]], length: int, before: int, mask: str | None, seed: int
) -> None:
    counts, rows = drawn
    batch, heads, tail = len(rows), len(counts[0]), length + before
    value_dim = VALUE_DIM if path == "torch" else KEY_DIM
    prefix = block(counts, rows, seed, value_dim)
    generator = torch.Generator().manual_seed(seed + 1)
    query = noise(generator, batch, GROUP * heads, length, KEY_DIM)
    states = noise(generator, batch, heads, tail, KEY_DIM), noise(generator, batch, heads, tail, value_dim)
    visible = torch.ones(batch, GROUP * heads, length, tail, dtype=torch.bool).tril(before)
    given_mask = None
    if mask is not None:
        hidden = torch.rand(batch, GROUP * heads if mask == "head" else 1, length, tail, generator=generator) < 0.5
        hidden &= torch.arange(tail) != torch.arange(before, tail)[:, None]  # every query sees itself
        visible = visible & ~hidden
        given_mask = visible if mask == "head" else visible[:, :1]
    actual = decode_attention(query, prefix, *states, given_mask, SCALING)
    assert (actual.double() - naive(query, prefix, states, visible)).abs().max() < TOLERANCE[torch.float32]


@TWO_PATHS
@EXAMPLES
@given(ragged(), st.integers(1, 4), st.integers(0, 2**32))
def test_scores_behind_ragged_heads(
    path: str, drawn: tuple[list[list[int]], list[int]], window: int, seed: int
) -> None:
    counts, rows = drawn
    batch, heads, seq = len(rows), len(counts[0]), window + 4
    prefix = block(counts, rows, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    query = noise(generator, batch, GROUP * heads, window, KEY_DIM)
    keys = noise(generator, batch, heads, seq, KEY_DIM)
    weight = torch.rand(batch, window, generator=generator)
    weight[:, 0] = 1 - weight[:, 1:].sum(1)
    position, valid = torch.arange(4, seq), torch.ones(batch, seq, dtype=torch.bool)
    actual = window_scores(query, weight.clamp(min=0), position, keys, valid, prefix, SCALING).attention
    # The mass on an entry is attention to a value of 1 there, and 0 elsewhere.
    ones = torch.eye(seq).expand(batch, heads, -1, -1)
    zeros = PackedKV(prefix.keys, torch.zeros(len(prefix.keys), seq), prefix.counts, prefix.rows)
    visible = torch.ones(batch, GROUP * heads, window, seq, dtype=torch.bool).tril(4)
    mass = naive(query, zeros, (keys, ones), visible)
    expected = (mass * weight.clamp(min=0)[:, :, None, None]).sum(1)
    assert (actual.double() - expected).abs().max() < 1e-5


@TWO_PATHS
@EXAMPLES
@given(ragged(), st.integers(0, 2**32))
def test_ragged_heads_are_compacted(path: str, drawn: tuple[list[list[int]], list[int]], seed: int) -> None:
    counts = drawn[0]
    generator = torch.Generator().manual_seed(seed)
    seq = max(map(max, counts)) + 3
    keys, values = (noise(generator, len(counts), len(counts[0]), seq, dim) for dim in (KEY_DIM, VALUE_DIM))
    order = torch.rand(keys.shape[:3], generator=generator).argsort(-1)
    keep = order < torch.tensor(counts)[..., None]
    keys[~keep] = torch.nan
    packed = compact_kv(keys, values, keep)
    assert packed.counts == tuple(map(tuple, counts))
    for row in range(len(counts)):
        for head in range(len(counts[0])):
            actual = entries_of(packed, row, head)
            assert torch.equal(actual[0], keys[row, head][keep[row, head]])
            assert torch.equal(actual[1], values[row, head][keep[row, head]])


@settings(deadline=None)
@given(ragged(), st.sampled_from([1, 8, 1000]), st.sampled_from([1, 2000, 2**20]), st.booleans())
def test_groups_hold_every_head_once(
    drawn: tuple[list[list[int]], list[int]], numbers: int, at_once: int, gathers: bool
) -> None:
    prefix = block(*drawn, 0)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_groups, "AT_ONCE_ON_CPU", at_once)
        patch.setattr(head_groups, "ALONE", 2**30 if gathers else ALONE)
        groups = list(head_groups.head_groups(prefix, numbers))
    for group in groups:
        heads, longest = group.keys.shape[:2]
        assert heads == 1 or heads * longest * numbers <= max(at_once, heads if longest == 0 else 0)
        assert group.values.shape[:2] == (heads, longest)
        for place, pair in enumerate(group.pairs.tolist()):
            row, head = divmod(pair, prefix.kv_heads)
            keys, values = entries_of(prefix, row, head)
            assert 3 * len(keys) >= 2 * longest - FEW
            assert bool(len(keys)) == bool(longest)
            assert torch.equal(group.keys[place, : len(keys)], keys)
            assert torch.equal(group.values[place, : len(keys)], values)
            padding = torch.arange(longest) >= len(keys)
            assert torch.equal(padding, torch.zeros(longest) > 0 if group.padding is None else group.padding[place])
            assert (group.keys[place, len(keys) :] == keys[-1:]).all()  # nothing of another head is read
        if group.padding is None and longest >= ALONE and not gathers:
            assert group.keys.untyped_storage().data_ptr() == prefix.keys.untyped_storage().data_ptr()
        seen += group.pairs.tolist()
    assert sorted(seen) == list(range(prefix.batch * prefix.kv_heads))


def test_equal_heads_of_a_row_are_read_where_they_lie() -> None:
    """Together, as many as may be held at once."""
    many = ALONE + 5
    prefix = block([[many] * 3, [many - 1] * 3, [many] * 3], [1, 0, 2], 0)
    groups = list(head_groups.head_groups(prefix, 1))
    assert [group.pairs.tolist() for group in groups] == [[3, 4, 5], [6, 7, 8], [0, 1, 2]]
    assert all(group.keys.untyped_storage().data_ptr() == prefix.keys.untyped_storage().data_ptr() for group in groups)
    assert all(group.padding is None for group in groups)


class Calls(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


ROWS, HEADS = 16, 8
GROUPS = 7
"""Groups of heads of 0 to `ALONE` entries: each has heads of two thirds of the most, and of `FEW` / 3 less."""


def counted(work: Callable[[PackedKV], Any], most: int, **changes: Any) -> Counter[str]:
    """Operations on 128 heads, each with a number of entries of its own."""
    counts = torch.arange(ROWS * HEADS).view(ROWS, HEADS) * most // (ROWS * HEADS)
    prefix = block(counts.tolist(), [*range(1, ROWS), 0], 0, **changes)
    with Calls() as calls:
        work(prefix)
    return calls.names


@pytest.mark.parametrize(("length", "masked"), [(1, False), (9, False), (9, True)])
@pytest.mark.parametrize("value_dim", [KEY_DIM, VALUE_DIM], ids=["fused", "reference"])
def test_attention_does_not_go_through_the_heads(length: int, masked: bool, value_dim: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = noise(generator, ROWS, GROUP * HEADS, length, KEY_DIM)
    tail = noise(generator, ROWS, HEADS, 12, KEY_DIM), noise(generator, ROWS, HEADS, 12, value_dim)
    mask = torch.ones(ROWS, 1, length, 12, dtype=torch.bool).tril(12 - length) if masked else None
    names = counted(lambda prefix: decode_attention(query, prefix, *tail, mask, SCALING), ALONE, value_dim=value_dim)
    if value_dim == KEY_DIM:
        assert 1 < names["_scaled_dot_product_flash_attention_for_cpu"] <= 1 + GROUPS
    else:
        assert 1 < names["_softmax"] <= GROUPS
    assert sum(names.values()) < 5 * ROWS * HEADS


def test_large_heads_are_read_where_they_lie() -> None:
    """With a call each on a CPU, and never more."""
    generator = torch.Generator().manual_seed(1)
    query, tail = noise(generator, ROWS, HEADS, 40, KEY_DIM), noise(generator, ROWS, HEADS, 40, KEY_DIM)
    names = counted(lambda prefix: decode_attention(query, prefix, tail, tail, None, SCALING), 2 * ALONE)
    calls = names["_scaled_dot_product_flash_attention_for_cpu"]
    assert ROWS * HEADS // 2 < calls <= 1 + GROUPS + ROWS * HEADS // 2


def test_large_heads_are_put_together_where_calls_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without Triton, whose heads are never alone for their size."""
    monkeypatch.setattr(head_groups, "ALONE", 2**30)
    generator = torch.Generator().manual_seed(1)
    query, tail = noise(generator, ROWS, HEADS, 40, KEY_DIM), noise(generator, ROWS, HEADS, 40, KEY_DIM)
    names = counted(lambda prefix: decode_attention(query, prefix, tail, tail, None, SCALING), 2 * ALONE)
    assert names["_scaled_dot_product_flash_attention_for_cpu"] <= 3 + GROUPS


@pytest.mark.parametrize("window", [1, 30])
def test_scores_do_not_go_through_the_heads(window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys = noise(generator, ROWS, HEADS, window, KEY_DIM), noise(generator, ROWS, HEADS, 50, KEY_DIM)
    weight, valid = torch.full((ROWS, window), 1 / window), torch.ones(ROWS, 50, dtype=torch.bool)
    position = torch.arange(50 - window, 50)
    names = counted(lambda prefix: window_scores(query, weight, position, keys, valid, prefix, SCALING), ALONE)
    assert 1 < names["log_"] <= 2 * GROUPS + window


def test_the_cpp_kernel_takes_ragged_heads_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    query, tail = noise(generator, ROWS, GROUP * HEADS, 90, 32), noise(generator, ROWS, HEADS, 90, 32)
    calls = []
    attend = decode._decode_cpp.attend
    monkeypatch.setattr(decode._decode_cpp, "attend", lambda *a: calls.append(len(a)) or attend(*a))
    counts = torch.arange(ROWS * HEADS).view(ROWS, HEADS)
    keys = noise(generator, int(counts.sum()), 32)
    prefix = PackedKV(keys, keys, tuple(map(tuple, counts.tolist())), tuple(range(ROWS)))
    decode_attention(query[:, :, :1], prefix, tail, tail, None, SCALING)
    monkeypatch.setattr(decode._decode_cpp, "PARTIAL_SUMS", 2**30)
    calls.clear()
    decode_attention(query, prefix, tail, tail, None, SCALING)
    assert len(calls) == 1


def test_blocks_are_joined_without_going_through_the_heads() -> None:
    names = counted(lambda prefix: prefix.appended(prefix), ALONE)
    assert sum(names.values()) <= 6
