# SPDX-License-Identifier: Apache-2.0
"""Merged attention states against attention over all keys at once, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.kernels import merge_states
from precision import max_difference

DIM, VALUE_DIM = 5, 3
EXACT = 1e-12

State = tuple[Tensor, Tensor]


class Attention:
    """Queries [batch, q_heads, query, dim], and keys and values of which parts can be attended to."""

    def __init__(
        self, seed: int, keys: int, batch: int = 2, heads: int = 2, length: int = 2, scale: float = 1.0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query, self.keys, self.values = (
            torch.randn(batch, heads, count, dim, generator=generator, dtype=torch.float64)
            for count, dim in ((length, DIM), (keys, DIM), (keys, VALUE_DIM))
        )
        self.query *= scale

    def state(self, part: Sequence[int]) -> State:
        """Naive softmax attention over some keys; over none the output is NaN and the log-sum-exp -inf."""
        logits = self.query @ self.keys[:, :, part].mT
        return logits.softmax(-1) @ self.values[:, :, part] if len(part) else self.nothing(), logits.logsumexp(-1)

    def nothing(self) -> Tensor:
        return torch.full((*self.query.shape[:3], VALUE_DIM), torch.nan, dtype=torch.float64)

    def whole(self) -> State:
        return self.state(range(self.keys.shape[2]))


def merged(states: Sequence[State]) -> State:
    outputs, lses = zip(*states, strict=True)
    return merge_states(outputs, lses)


def assert_same(actual: State, expected: State, bound: float = EXACT) -> None:
    for tensor, reference in zip(actual, expected, strict=True):
        assert tensor.shape == reference.shape
        assert max_difference(tensor, reference) < bound * max(1, reference.abs().max().item())


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """Up to nine keys in up to five parts, in any order, some of them empty; at least one key."""
    parts = draw(st.integers(1, 5))
    owner = draw(st.lists(st.integers(0, parts - 1), min_size=1, max_size=9))
    split = [[key for key, part in enumerate(owner) if part == own] for own in range(parts)]
    return draw(st.permutations(split))


@settings(deadline=None)
@given(st.integers(0, 2**32), splits(), st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
def test_any_split_in_any_order_is_attention_over_all_keys(seed: int, split: list[list[int]], scale: float) -> None:
    attention = Attention(seed, sum(map(len, split)), scale=scale)
    actual = merged([attention.state(part) for part in split])
    assert_same(actual, attention.whole())
    assert actual[0].dtype == actual[1].dtype == torch.float64


@settings(deadline=None)
@given(st.integers(0, 2**32), splits(), st.data())
def test_parts_may_be_merged_in_any_grouping(seed: int, split: list[list[int]], data: st.DataObject) -> None:
    attention = Attention(seed, sum(map(len, split)))
    states = [attention.state(part) for part in split]
    while len(states) > 1:
        begin = data.draw(st.integers(0, len(states) - 2))
        end = data.draw(st.integers(begin + 2, len(states)))
        states[begin:end] = [merged(states[begin:end])]
    assert_same(merged(states), attention.whole())


def test_rows_may_be_empty_in_different_parts() -> None:
    """The first row of the batch sees the first part alone, the second the second, and the third neither."""
    attention = Attention(1, 6, batch=3)
    states = [attention.state(range(3)), attention.state(range(3, 6))]
    for (output, lse), hidden in zip(states, ([1, 2], [0, 2]), strict=True):
        output[hidden], lse[hidden] = torch.nan, -torch.inf
    output, lse = merged(states)
    for row in (0, 1):
        assert torch.equal(output[row], states[row][0][row])
        assert torch.equal(lse[row], states[row][1][row])
    assert (output[2] == 0).all()
    assert (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_where_all_parts_are_empty_the_output_is_0(parts: int) -> None:
    attention = Attention(2, 0)
    output, lse = merged([attention.state([])] * parts)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_nan_of_a_part_shows_where_it_is(parts: int) -> None:
    attention = Attention(3, 6)
    for bad, where in itertools.product(range(parts), ("output", "lse")):
        states = [attention.state(range(2 * part, 2 * part + 2)) for part in range(parts)]
        if where == "output":
            states[bad][0][0, 1, 0, 2] = torch.nan
        else:
            states[bad][1][0, 1, 0] = torch.nan
        output, lse = merged(states)
        strange = torch.zeros_like(output, dtype=torch.bool)
        strange[0, 1, 0, 2 if where == "output" else slice(None)] = True
        if parts == 1 and where == "lse":  # there is nothing to weigh
            strange[:] = False
        assert torch.equal(output.isnan(), strange)
        assert lse.isnan().sum() == (where == "lse")


def test_a_nan_beside_an_empty_part_is_kept() -> None:
    states = [Attention(4, 2).state([0, 1]), Attention(4, 0).state([])]
    states[0][1][0, 0, 0] = torch.nan
    for order in (states, states[::-1]):
        output, lse = merged(order)
        assert output[0, 0, 0].isnan().all()
        assert lse[0, 0, 0].isnan()
        assert output.isnan().sum() == VALUE_DIM


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_an_infinite_output_is_not_finite_in_the_result(bad: float) -> None:
    states = [Attention(5, 4).state(part) for part in ([0, 1], [2, 3])]
    states[1][0][1, 0, 1, 2] = bad
    output, _ = merged(states)
    assert not output[1, 0, 1, 2].isfinite()
    assert output.isfinite().sum() == output.numel() - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """The result of many parts is the nearest number of its dtype, but for the noise of float32."""
    attention = Attention(6, 40)
    states = [attention.state([key]) for key in range(40)]
    outputs, lses = [output.to(dtype) for output, _ in states], [lse.float() for _, lse in states]
    output, lse = merge_states(outputs, lses)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    exact, exact_lse = merge_states([output.double() for output in outputs], [lse.double() for lse in lses])
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((output.double() - exact).abs() <= spacing / 2 + 40 * torch.finfo(torch.float32).eps).all()
    assert max_difference(lse, exact_lse) < 1e-5


def test_the_widest_dtypes_are_kept() -> None:
    output, lse = Attention(7, 3).whole()
    for first, second, expected in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ):
        assert merge_states([output.to(first), output.to(second)], [lse.float()] * 2)[0].dtype == expected
    assert merge_states([output.float()] * 2, [lse.float(), lse])[1].dtype == torch.float64
    assert merge_states([output.bfloat16()], [lse.bfloat16()])[1].dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    attention = Attention(8, 6)
    states = [tuple(tensor.float() for tensor in attention.state(part)) for part in ([0, 1, 2], [3], [4, 5])]
    expected = merged(states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = merged(states)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_inputs_are_not_changed_and_share_no_memory_with_the_result() -> None:
    states = [Attention(9, 4).state(part) for part in ([0, 1], [2, 3])]
    for parts in (states, states[:1]):
        before = [(output.clone(), lse.clone()) for output, lse in parts]
        output, lse = merged(parts)
        output.fill_(7)
        lse.fill_(7)
        assert all(
            torch.equal(a, b) for part, old in zip(parts, before, strict=True) for a, b in zip(part, old, strict=True)
        )


@pytest.mark.parametrize("split", [([0, 1, 2], [3]), ([], [0, 1, 2, 3]), ([0], [], [1, 2, 3])], ids=str)
def test_the_gradient_is_that_of_attention_over_all_keys(split: Sequence[list[int]]) -> None:
    gradients = []
    for parts in (split, [range(4)]):
        attention = Attention(10, 4)
        tensors = [tensor.requires_grad_() for tensor in (attention.query, attention.keys, attention.values)]
        output, lse = merged([attention.state(part) for part in parts])
        weight = torch.arange(output.numel(), dtype=torch.float64).view(output.shape)
        ((output * weight).sum() + (lse * weight[..., 0]).sum()).backward()
        gradients.append([tensor.grad for tensor in tensors])
    for actual, expected in zip(*gradients, strict=True):
        assert max_difference(actual, expected) < EXACT * 100


def test_empty_parts_leave_no_nan_in_the_gradient() -> None:
    output, lse = torch.randn(1, 1, 2, 3, requires_grad=True), torch.full((1, 1, 2), -torch.inf, requires_grad=True)
    result, total = merge_states([output, output], [lse, lse])
    (result.sum() + total.exp().sum()).backward()
    assert output.grad is not None
    assert (output.grad == 0).all()
    assert lse.grad is not None
    assert (lse.grad == 0).all()
    with torch.no_grad():
        assert not merge_states([output, output], [lse, lse])[0].requires_grad


def test_parts_that_do_not_fit_are_refused() -> None:
    output, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="at least one part: got 0 outputs and 0 log-sum-exps"):
        merge_states([], [])
    with pytest.raises(ValueError, match="got 2 outputs and 1 log-sum-exps"):
        merge_states([output, output], [lse])
    for outputs, lses in (
        ([output, output[:, :1]], [lse, lse]),
        ([output, output], [lse, lse[:, :, :1]]),
        ([output], [lse[..., None]]),
    ):
        with pytest.raises(ValueError, match=r"the same in all parts: got \[\(1, 2, 3, 4\)"):
            merge_states(outputs, lses)
