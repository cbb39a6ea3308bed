# SPDX-License-Identifier: Apache-2.0
"""The three operations against naive float64 softmax attention. Random inputs, never zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packed import entries_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plphp.kernels import (
    _decode_cpp,
    _decode_torch,
    choice,
    compact_kv,
    decode,
    decode_attention,
    scores,
    window_scores,
)
from plphp.kernels.packed import PackedKV

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of one attention over some twenty entries, not of a model: in float32 twenty times what 4,500 random cases show. Half
precision rounds its inputs and results, on every processor alike; what is between is float32."""
KEY_DIM, VALUE_DIM = 8, 6
SCALING = 0.6


def noise(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


@dataclass
class Case:
    """Dense keys with a mask of what is kept of them, a tail, and queries at the end of the tail."""

    query: Tensor
    keys: Tensor
    values: Tensor
    keep: Tensor
    tail_keys: Tensor
    tail_values: Tensor

    @property
    def prefix(self) -> PackedKV:
        return compact_kv(self.keys, self.values, self.keep)

    def visible(self, mask: Tensor | None = None) -> Tensor:
        """bool [batch, q_heads, query, seq + tail]: the kept prefix, and the tail causally or as the mask says."""
        batch, q_heads, length, _ = self.query.shape
        tail, group = self.tail_keys.shape[2], q_heads // self.keys.shape[1]
        shown = torch.zeros(batch, q_heads, length, tail, dtype=torch.bool)
        for i in range(length):
            shown[:, :, i, : tail - length + i + 1] = True
        if mask is not None:
            shown &= mask
        kept = self.keep.repeat_interleave(group, 1)[:, :, None].expand(-1, -1, length, -1)
        return torch.cat([kept, shown], dim=-1)

    def naive(self, visible: Tensor, bias: Tensor | None = None) -> Tensor:
        """Float64 attention, [batch, query, q_heads, dim]; one query and one head at a time."""
        group = self.query.shape[1] // self.keys.shape[1]
        keys = torch.cat([self.keys, self.tail_keys], dim=2).double()
        values = torch.cat([self.values, self.tail_values], dim=2).double()
        out = torch.empty(*self.query.shape[:3], values.shape[-1], dtype=torch.float64)
        for row in range(out.shape[0]):
            for head in range(out.shape[1]):
                for i in range(out.shape[2]):
                    seen = visible[row, head, i]
                    logits = keys[row, head // group][seen] @ self.query[row, head, i].double() * SCALING
                    if bias is not None:
                        logits = logits + bias[row, head, i].double()[seen]
                    out[row, head, i] = logits.softmax(0) @ values[row, head // group][seen]
        return out.transpose(1, 2)


def make(
    seed: int = 0,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    length: int = 1,
    tail: int = 5,
    seq: int = 9,
    kept: str = "ragged",
    dtype: torch.dtype = torch.float32,
    value_dim: int = VALUE_DIM,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, kv_heads, seq, generator=generator) < 0.5
    if kept == "dense":
        keep = torch.rand(batch, kv_heads, seq, generator=generator).argsort(-1) < seq // 2
    elif kept == "row":  # every head of a row as many, rows differ
        order = torch.rand(batch, kv_heads, seq, generator=generator).argsort(-1)
        keep = order < torch.arange(2, batch + 2)[:, None, None]
    elif kept == "empty":
        keep[0], keep[-1, -1] = False, False
    elif kept == "none":
        keep[:] = False
    return Case(
        noise(generator, batch, kv_heads * group, length, KEY_DIM, dtype=dtype),
        noise(generator, batch, kv_heads, seq, KEY_DIM, dtype=dtype),
        noise(generator, batch, kv_heads, seq, value_dim, dtype=dtype),
        keep,
        noise(generator, batch, kv_heads, tail, KEY_DIM, dtype=dtype),
        noise(generator, batch, kv_heads, tail, value_dim, dtype=dtype),
    )


def attend(case: Case, mask: Tensor | None = None) -> Tensor:
    return decode_attention(case.query, case.prefix, case.tail_keys, case.tail_values, mask, SCALING)


def assert_attention(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    assert (actual.double() - expected).abs().max() < TOLERANCE[dtype]


def assert_scores(actual: Tensor, expected: Tensor, case: Case) -> None:
    """Softmax mass in float32: rounding a logit moves it by the unit roundoff times the logit, as everywhere.

    Twice that is thrice what 1,500 random cases show.
    """
    keys = torch.cat([case.keys, case.tail_keys], dim=2).double()
    logits = case.query.double().unflatten(1, (keys.shape[1], -1)).flatten(2, 3) @ keys.mT * SCALING
    largest = logits[logits.isfinite()].abs().max().item()
    assert (actual.double() - expected).abs().max() < 2 * torch.finfo(torch.float32).eps * (1 + largest)


KEPT = ("ragged", "dense", "row", "empty", "none")


@pytest.fixture(params=["torch", "triton", "C++"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference; the Triton kernels, under Triton's interpreter where there is no GPU; and the C++ kernel."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(choice, "unsupported_by_triton", lambda *_: None)
        monkeypatch.setattr(choice, "trouble", lambda *_: None)  # a wrong kernel is to fail here, not to be left out
    if request.param == "C++":
        monkeypatch.setattr(decode, "_by_torch", by_cpp(decode._by_torch))
    return request.param


def by_cpp(otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The C++ kernel, on states with zeros behind their few dimensions."""

    def attend(
        query: Tensor, prefix: PackedKV, tail_keys: Tensor, tail_values: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        if torch.float16 in (query.dtype, tail_values.dtype):
            return otherwise(query, prefix, tail_keys, tail_values, bias, scaling)
        wide = dataclasses.replace(prefix, keys=widened(prefix.keys, 40), values=widened(prefix.values, 35))
        states = widened(query, 40), wide, widened(tail_keys, 40), widened(tail_values, 35)
        return _decode_cpp.attend(*states, bias, scaling)[..., : tail_values.shape[-1]].contiguous()

    return attend


def widened(states: Tensor, dim: int) -> Tensor:
    """Zeros behind the dimensions of each head."""
    return torch.nn.functional.pad(states, (0, dim - states.shape[-1]))


ALL = pytest.mark.usefixtures("backend")
WIDTHS = pytest.mark.parametrize("value_dim", [VALUE_DIM, KEY_DIM], ids=["narrow", "fused"])
"""Values as wide as the keys go through torch's fused kernel on a CPU."""


@ALL
@WIDTHS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    ("kv_heads", "group", "length", "tail"), [(1, 4, 1, 1), (2, 3, 1, 9), (2, 3, 4, 4), (3, 1, 3, 7)]
)
def test_attention_is_naive_attention(
    kv_heads: int, group: int, length: int, tail: int, kept: str, dtype: torch.dtype, value_dim: int
) -> None:
    case = make(1, 3, kv_heads, group, length, tail, kept=kept, dtype=dtype, value_dim=value_dim)
    assert_attention(attend(case), case.naive(case.visible()), dtype)


@pytest.mark.parametrize("which", ["query", "tail_keys", "tail_values"])
@pytest.mark.parametrize("kept", KEPT)
def test_attention_has_a_gradient(kept: str, which: str) -> None:
    case = make(3, 3, length=3, tail=4, kept=kept, value_dim=KEY_DIM)
    expected = attend(case)
    states = getattr(case, which).requires_grad_()
    out = attend(case)
    torch.testing.assert_close(out, expected)
    generator = torch.Generator().manual_seed(4)
    weight, step = noise(generator, *out.shape), 1e-2 * noise(generator, *states.shape)
    (out * weight).sum().backward()
    with torch.no_grad():
        moved = [attend(dataclasses.replace(case, **{which: states + sign * step})) for sign in (1, -1)]
    assert states.grad is not None
    rise = ((moved[0] - moved[1]) * weight).sum().item() / 2
    assert (states.grad * step).sum().item() == pytest.approx(rise, rel=0.02)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(1, 8),
    st.sampled_from(KEPT),
    st.sampled_from([VALUE_DIM, KEY_DIM]),
)
def test_attention_over_random_shapes(
    seed: int, batch: int, kv_heads: int, group: int, length: int, before: int, seq: int, kept: str, value_dim: int
) -> None:
    case = make(seed, batch, kv_heads, group, length, length + before, seq, kept, value_dim=value_dim)
    assert_attention(attend(case), case.naive(case.visible()))


def tail_padding(case: Case) -> Tensor:
    """bool [batch, tail]: the first tail entries of the later rows are padding."""
    batch, tail = case.query.shape[0], case.tail_keys.shape[2]
    return torch.arange(tail) >= torch.arange(batch)[:, None]


@ALL
@WIDTHS
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("kind", ["bool", "bool heads", "additive", "additive heads", "one row", "bool 2d", "int 2d"])
@pytest.mark.parametrize("length", [1, 3])
def test_every_kind_of_mask(kind: str, length: int, kept: str, value_dim: int) -> None:
    case = make(2, 3, 2, 2, length, 6, kept=kept, value_dim=value_dim)
    generator = torch.Generator().manual_seed(3)
    shown = tail_padding(case)[:, None, None]
    bias = None
    if kind == "one row":
        shown = shown[1:2].expand(3, -1, -1, -1)
    if kind.endswith("heads"):
        random = torch.rand(3, 4, length, 6, generator=generator) < 0.5
        for i in range(length):  # every query sees itself
            random[:, :, i, 6 - length + i] = shown[:, :, 0, 6 - length + i] = True
        shown = shown & random
    visible = case.visible(shown)
    in_tail = visible[..., case.keys.shape[2] :]
    full: Tensor | None = in_tail if kind.endswith("heads") else in_tail[:, :1]
    if kind == "one row":
        full = in_tail[:1, :1]
    if kind.startswith("additive"):
        bias = noise(generator, 3, 4 if "heads" in kind else 1, length, 6)
        full = torch.where(full, bias, -torch.inf)
        bias = torch.cat([torch.zeros(3, bias.shape[1], length, case.keys.shape[2]), bias], -1).expand(3, 4, -1, -1)
    elif kind.endswith("2d"):
        full = tail_padding(case)
        full = torch.cat([torch.zeros(3, 9, dtype=torch.bool), full], dim=1)  # transformers covers the prefix, too
        full = full.long() if kind.startswith("int") else full
    assert_attention(attend(case, full), case.naive(visible, bias))


@ALL
@WIDTHS
def test_additive_mask_with_finite_minimum_as_of_transformers(value_dim: int) -> None:
    case = make(4, length=2, dtype=torch.bfloat16, value_dim=value_dim)
    visible = case.visible(tail_padding(case)[:, None, None])
    shown = visible[:, :1, :, case.keys.shape[2] :]
    mask = torch.zeros(shown.shape, dtype=torch.bfloat16).masked_fill_(~shown, torch.finfo(torch.bfloat16).min)
    assert_attention(attend(case, mask), case.naive(visible), torch.bfloat16)


@pytest.mark.parametrize("limit", [1, 150, 700])
@pytest.mark.parametrize("kept", ["ragged", "dense"])
@pytest.mark.parametrize("masked", [False, True])
def test_long_queries_are_cut(monkeypatch: pytest.MonkeyPatch, limit: int, kept: str, masked: bool) -> None:
    case = make(5, length=11, tail=13, kept=kept)
    visible = case.visible(tail_padding(case)[:, None, None]) if masked else case.visible()
    mask = visible[..., case.keys.shape[2] :] if masked else None
    sizes = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, *a, **k: sizes.append(x.numel()) or softmax(x, *a, **k))
    attend(case, mask)
    calls = len(sizes)
    monkeypatch.setattr(_decode_torch, "MAX_LOGITS", limit)
    sizes.clear()
    cut = attend(case, mask)
    assert len(sizes) > calls or (kept, limit) == ("ragged", 700)  # one head alone is smaller
    assert max(sizes) <= max(limit, 2 * 4 * (9 + 13))
    monkeypatch.undo()
    assert_attention(cut, case.naive(visible))


class FusedCalls(TorchDispatchMode):
    """Notes the masks that torch's fused kernel for CPUs is given."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor | None] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.masks.append((kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [1, 150, 700])
@pytest.mark.parametrize("kept", ["ragged", "dense"])
@pytest.mark.parametrize("masked", [False, True])
def test_long_queries_of_the_fused_kernel_are_cut(
    monkeypatch: pytest.MonkeyPatch, limit: int, kept: str, masked: bool
) -> None:
    case = make(5, length=11, tail=13, kept=kept, value_dim=KEY_DIM)
    visible = case.visible(tail_padding(case)[:, None, None]) if masked else case.visible()
    monkeypatch.setattr(_decode_torch, "MAX_LOGITS", limit)
    with FusedCalls() as calls:
        cut = attend(case, visible[..., case.keys.shape[2] :] if masked else None)
    sizes = [mask.numel() for mask in calls.masks if mask is not None]
    assert len(sizes) > 1
    assert max(sizes) <= max(limit, 2 * 4 * 13)
    assert_attention(cut, case.naive(visible))


@ALL
@WIDTHS
@pytest.mark.parametrize("kept", ["ragged", "dense"])
@pytest.mark.parametrize("hidden", [False, -torch.inf, torch.finfo(torch.float32).min])
def test_a_query_that_sees_nothing_of_the_tail_sees_the_prefix(hidden: float, kept: str, value_dim: int) -> None:
    case = make(16, length=3, tail=4, kept=kept, value_dim=value_dim)
    shown = torch.ones(2, 1, 3, 4, dtype=torch.bool).tril(1)
    shown[0, :, :2], shown[1, :, 1] = False, False
    mask = shown if hidden is False else torch.zeros(shown.shape).masked_fill(~shown, hidden)
    assert_attention(attend(case, mask), case.naive(case.visible(shown)))


@ALL
@WIDTHS
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("which", ["query", "tail_keys", "tail_values"])
def test_any_strides_will_do(which: str, group: int, value_dim: int) -> None:
    case = make(17, group=group, length=3, tail=4, value_dim=value_dim)
    expected = case.naive(case.visible())
    setattr(case, which, getattr(case, which).mT.contiguous().mT)
    assert_attention(attend(case), expected)


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_evicted_entries_never_leak(bad: float) -> None:
    case = make(6, length=2)
    expected = case.naive(case.visible())
    case.keys[~case.keep] = bad
    case.values[~case.keep] = bad
    assert_attention(attend(case), expected)


@ALL
@pytest.mark.parametrize("kept", KEPT)
def test_output_and_prefix_share_no_memory_with_the_inputs(kept: str) -> None:
    case = make(7, kept=kept)
    prefix = case.prefix
    before = prefix.keys.clone(), prefix.values.clone()
    first = decode_attention(case.query, prefix, case.tail_keys, case.tail_values, None, SCALING)
    expected = first.clone()
    inputs = {t.untyped_storage().data_ptr() for t in (case.query, case.tail_keys, case.tail_values)}
    assert first.untyped_storage().data_ptr() not in inputs | {prefix.values.untyped_storage().data_ptr()}
    for tensor in (case.keys, case.values):
        tensor.fill_(torch.nan)
    assert torch.equal(prefix.keys, before[0])
    assert torch.equal(prefix.values, before[1])
    again = decode_attention(case.query, prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert torch.equal(again, expected)


@ALL
def test_inputs_are_not_changed() -> None:
    case = make(8, length=3)
    mask = torch.where(case.visible()[:, :1, :, case.keys.shape[2] :], 0.0, -torch.inf)
    tensors = (case.query, case.tail_keys, case.tail_values, mask)
    before = [tensor.clone() for tensor in tensors]
    attend(case, mask)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.sampled_from(KEPT))
def test_compact_keeps_the_marked_entries_in_order(seed: int, batch: int, kv_heads: int, seq: int, kept: str) -> None:
    case = make(seed, batch, kv_heads, seq=seq, kept=kept)
    strided = case.keys.transpose(1, 2).contiguous().transpose(1, 2)
    packed = compact_kv(strided, case.values, case.keep)
    assert packed.counts == tuple(tuple(row) for row in case.keep.sum(-1).tolist())
    assert packed.keys.untyped_storage().nbytes() == packed.keys.nbytes
    for row in range(batch):
        for head in range(kv_heads):
            keys, values = entries_of(packed, row, head)
            assert torch.equal(keys, case.keys[row, head][case.keep[row, head]])
            assert torch.equal(values, case.values[row, head][case.keep[row, head]])


def naive_scores(
    case: Case, weight: Tensor, position: Tensor, valid: Tensor, with_prefix: bool, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Weighted mean over the window of float64 softmax rows, over the kept prefix and the tail."""
    batch, q_heads, window, _ = case.query.shape
    group, tail = q_heads // case.keys.shape[1], case.tail_keys.shape[2]
    result = torch.zeros(batch, q_heads, tail, dtype=dtype)
    for row in range(batch):
        for head in range(q_heads):
            for i in range(window):
                if weight[row, i] == 0:
                    continue
                seen = valid[row] & (torch.arange(tail) <= position[i])
                query = case.query[row, head, i].double() * SCALING
                old = case.keys[row, head // group][case.keep[row, head // group]].double() @ query
                old = old if with_prefix else old[:0]
                new = case.tail_keys[row, head // group].double() @ query
                mass = torch.cat([old, new[seen]]).softmax(0)[len(old) :]
                result[row, head, seen] += weight[row, i].double() * mass
    return result


def window(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, positions and padding of a window at the end; padded rows have another window."""
    batch, _, length, _ = case.query.shape
    tail = case.tail_keys.shape[2]
    position = torch.arange(tail - length, tail)
    weight = torch.ones(batch, length)
    valid = tail_padding(case)
    for row in range(1, batch):
        weight[row, : min(row, length - 1)] = 0
    return weight / weight.sum(1, keepdim=True), position, valid


@ALL
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kept", [*KEPT, None])
@pytest.mark.parametrize(("kv_heads", "group", "length", "tail"), [(1, 4, 1, 6), (2, 3, 4, 7), (3, 1, 3, 9)])
def test_scores_are_naive_softmax_mass(
    kv_heads: int, group: int, length: int, tail: int, kept: str | None, dtype: torch.dtype
) -> None:
    case = make(9, 3, kv_heads, group, length, tail, kept=kept or "ragged", dtype=dtype)
    weight, position, valid = window(case)
    prefix = case.prefix if kept else None
    actual = window_scores(case.query, weight, position, case.tail_keys, valid, prefix, SCALING).attention
    expected = naive_scores(case, weight, position, valid, kept is not None)
    assert actual.dtype == torch.float32
    # Half-precision inputs are exact in float32, so the error does not grow with them.
    assert_scores(actual, expected, case)
    assert (actual[~valid[:, None].expand_as(actual)] == 0).all()
    if not kept:
        torch.testing.assert_close(actual.sum(-1), torch.ones(actual.shape[:2]))


def test_scores_read_the_keys_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(10, length=3, tail=17)
    arguments = (case.query, *window(case)[:2], case.tail_keys, window(case)[2], case.prefix, SCALING)
    whole = window_scores(*arguments).attention
    monkeypatch.setattr(scores, "KEYS_AT_ONCE", 4)
    torch.testing.assert_close(window_scores(*arguments).attention, whole)


@ALL
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter's numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_do_not_read_padding_or_later_keys(bad: float) -> None:
    case = make(11, length=1, tail=6)
    weight, _, valid = window(case)
    position = torch.tensor([4])
    expected = naive_scores(case, weight, position, valid, True)
    case.tail_keys.transpose(1, 2)[~valid] = bad
    case.tail_keys[:, :, 5] = bad
    actual = window_scores(case.query, weight, position, case.tail_keys, valid, case.prefix, SCALING).attention
    assert_scores(actual, expected, case)
    assert (actual[:, :, 5] == 0).all()


@ALL
def test_rows_without_a_query_in_a_column_take_nothing_from_it() -> None:
    """Also where the query that does not count is NaN."""
    case = make(12, length=2, tail=5)
    weight = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    valid = torch.ones(2, 5, dtype=torch.bool)
    position = torch.tensor([3, 4])
    expected = naive_scores(case, weight, position, valid, True)
    case.query[0, :, 0] = torch.nan
    actual = window_scores(case.query, weight, position, case.tail_keys, valid, case.prefix, SCALING).attention
    assert_scores(actual, expected, case)


@ALL
@pytest.mark.parametrize("where", ["query", "key", "prefix"])
def test_nan_that_is_seen_shows_in_the_scores(where: str) -> None:
    case = make(13, length=1)
    weight, position, valid = window(case)
    if where == "query":
        case.query[0, 0, 0, 0] = torch.nan
    elif where == "key":
        case.tail_keys[0, 0, -1, 0] = torch.nan
    else:
        case.keys[0, 0, case.keep[0, 0].nonzero()[0, 0], 0] = torch.nan
    actual = window_scores(case.query, weight, position, case.tail_keys, valid, case.prefix, SCALING).attention
    assert actual[0, 0].isnan().any()
    assert actual[1].isfinite().all()


def naive_mass(case: Case, position: int, index: int, valid: Tensor, with_prefix: bool) -> Tensor:
    """Float64 softmax mass of one query on the tail, [batch, q_heads, tail]."""
    weight = torch.ones(case.query.shape[0], 1)
    alone = dataclasses.replace(case, query=case.query[:, :, index : index + 1])
    return naive_scores(alone, weight, torch.tensor([position]), valid, with_prefix)


@pytest.mark.parametrize("at_once", [1, 3 * 6 * 9 * 3, scores.MASS_AT_ONCE])
@pytest.mark.parametrize("kept", [*KEPT, None])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_evidence_is_that_of_naive_rows(
    monkeypatch: pytest.MonkeyPatch, reduction: str, kept: str | None, at_once: int
) -> None:
    monkeypatch.setattr(scores, "MASS_AT_ONCE", at_once)
    case = make(14, 3, 2, 3, 4, 9, kept=kept or "ragged")
    weight, position, valid = window(case)
    vision = torch.zeros_like(valid)
    vision[:, 1:5] = valid[:, 1:5]
    prefix = case.prefix if kept else None
    arguments = (case.query, weight, position, case.tail_keys, valid, prefix, SCALING)
    evidence = window_scores(
        *arguments, peak=True, best_position=True, density=0.4, candidates=vision, gqa_reduction=reduction
    )
    plain = window_scores(*arguments)
    assert torch.equal(evidence.attention, plain.attention)
    assert plain.peak is plain.best_position is plain.density is None
    assert evidence.peak is not None
    assert evidence.best_position is not None
    assert evidence.density is not None
    for row in range(3):
        rows = [i for i in range(4) if weight[row, i] > 0]
        mass = [naive_mass(case, int(position[i]), i, valid, kept is not None)[row] for i in rows]
        assert_scores(evidence.peak[row], torch.stack(mass).amax(0), case)
        density = torch.zeros(6)
        for i, of_row in zip(rows, mass, strict=True):
            seen = [p for p in range(9) if valid[row, p] and p <= position[i]]
            for head in range(6):
                dense = sum(float(of_row[head, p]) >= 0.4 * float(of_row[head].max()) for p in seen)
                density[head] += dense / len(seen) / len(rows)
        torch.testing.assert_close(evidence.density[row], density)
        for head in range(2):
            expected = [9] * 9
            for i, of_row in zip(rows, mass, strict=True):
                group = of_row[3 * head : 3 * head + 3]
                score = (group.mean(0) if reduction == "mean" else group.amax(0)).tolist()
                seen = [p for p in range(9) if vision[row, p] and p <= position[i]]
                for position_in_order, p in enumerate(sorted(seen, key=lambda p: -score[p])):
                    expected[p] = min(expected[p], position_in_order)
            assert evidence.best_position[row, head].tolist() == expected


def test_a_nan_query_that_does_not_count_leaves_the_evidence_alone() -> None:
    case = make(15, length=2, tail=5)
    weight, valid, position = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.ones(2, 5, dtype=torch.bool), [3, 4]
    results = []
    for bad in (0.0, float("nan")):
        case.query[0, :, 0] = bad
        results.append(
            window_scores(
                case.query,
                weight,
                torch.tensor(position),
                case.tail_keys,
                valid,
                None,
                SCALING,
                peak=True,
                best_position=True,
                density=0.1,
                candidates=valid,
            )
        )
    assert all(
        torch.equal(getattr(results[0], n), getattr(results[1], n)) for n in ("peak", "best_position", "density")
    )
