# SPDX-License-Identifier: Apache-2.0
"""States of different dtypes, and autocast around them: what the kernels and a layer do with them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from test_cpp_kernel import wide
from test_kernels import (
    ALL,
    KEPT,
    SCALING,
    TOLERANCE,
    Case,
    assert_attention,
    attend,
    backend,
    make,
    naive_scores,
    window,
)
from transformers.cache_utils import DynamicLayer

from plphp.engines.hf.layer import PrunedLayer
from plphp.errors import CacheMemoryError
from plphp.kernels import choice, compact_kv, decode, window_scores
from plphp.kernels.decode import cpp_trial, decode_attention, triton_trial
from plphp.kernels.precision import as_written
from plphp.pruning.placement import whole_or_dropped

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [
    # query, prefix keys, prefix values, tail keys, tail values
    (FLOAT32, FLOAT32, BFLOAT16, FLOAT32, BFLOAT16),  # autocast, with a rotary embedding in float32
    (FLOAT32, FLOAT32, FLOAT16, FLOAT32, FLOAT16),
    (FLOAT32, FLOAT32, BFLOAT16, FLOAT32, FLOAT32),  # a step behind a turn under autocast
    (FLOAT32, FLOAT32, FLOAT32, FLOAT32, BFLOAT16),  # a step under autocast behind another turn
    (BFLOAT16, FLOAT32, FLOAT32, BFLOAT16, BFLOAT16),
    (BFLOAT16, BFLOAT16, FLOAT32, BFLOAT16, FLOAT32),
    (FLOAT32, BFLOAT16, BFLOAT16, BFLOAT16, BFLOAT16),  # a bank's queries
    (FLOAT16, BFLOAT16, FLOAT16, FLOAT16, BFLOAT16),
]
CPU = torch.device("cpu")
assert backend  # the fixture


def mixed(case: Case, mix: tuple[torch.dtype, ...]) -> Case:
    names = ("query", "keys", "values", "tail_keys", "tail_values")
    return dataclasses.replace(
        case, **{name: getattr(case, name).to(dtype) for name, dtype in zip(names, mix, strict=True)}
    )


def expected_of(case: Case) -> torch.Tensor:
    """Naive attention over the very numbers that the states hold."""
    names = ("query", "keys", "values", "tail_keys", "tail_values")
    exact = dataclasses.replace(case, **{name: getattr(case, name).double() for name in names})
    return exact.naive(exact.visible())


@ALL
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(one)[6:] for one in mix))
def test_attention_over_states_of_different_dtypes(mix: tuple[torch.dtype, ...], kept: str, backend: str) -> None:
    for length, value_dim in ((1, 8), (3, 6)):
        case = mixed(make(1, 3, 2, 3, length, tail=5, kept=kept, value_dim=value_dim), mix)
        found = attend(case)
        assert found.dtype == case.query.dtype
        # Triton weighs values of 16 bits with weights of as many, as it does where keys have 16 bits, too
        coarse = mix[0] if backend != "triton" else max(mix, key=TOLERANCE.__getitem__)
        assert (found.double() - expected_of(case)).abs().max() < TOLERANCE[coarse]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("mix", MIXES[:4], ids=lambda mix: "-".join(str(one)[6:] for one in mix))
def test_the_cpp_kernel_reads_wide_heads_of_different_dtypes(mix: tuple[torch.dtype, ...], kept: str) -> None:
    for dim, value_dim in ((40, 40), (64, 33), (32, 96)):
        case = mixed(wide(make(2, 2, 2, 3, tail=70, seq=150, kept=kept), dim, value_dim), mix)
        assert_attention(decode_attention(*states(case)), expected_of(case), case.query.dtype)


def states(case: Case) -> tuple[Any, ...]:
    return case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING


def test_float32_keys_and_bfloat16_values_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mixed(wide(make(3, tail=5)), MIXES[0])
    kernel, calls = decode._decode_cpp.attend, []
    monkeypatch.setattr(decode._decode_cpp, "attend", lambda *given: calls.append(given) or kernel(*given))
    assert choice.trouble(cpp_trial, CPU, FLOAT32, 64, 64, BFLOAT16) is None
    calls.clear()
    arguments = states(case)
    decode_attention(*arguments)
    ((query, prefix, keys, values, *_),) = calls
    assert query is arguments[0]
    assert prefix is arguments[1]
    assert keys is arguments[2]
    assert values is arguments[3]


@pytest.mark.parametrize("trial", [cpp_trial, triton_trial], ids=["C++", "Triton"])
def test_each_pair_of_dtypes_is_tried(trial: choice.Trial) -> None:
    if trial is triton_trial:
        pytest.importorskip("triton")
    assert choice.trouble.__wrapped__(trial, CPU, FLOAT32, 64, 64, BFLOAT16) is None


def test_a_kernel_that_is_wrong_for_one_pair_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = decode._decode_cpp.attend

    def wrong(*given: Any) -> torch.Tensor:
        return kernel(*given) + (given[3].dtype is BFLOAT16 and given[0].dtype is FLOAT32)

    monkeypatch.setattr(decode._decode_cpp, "attend", wrong)
    monkeypatch.setattr(choice, "trouble", choice.trouble.__wrapped__)
    for mix in (MIXES[0], (FLOAT32,) * 5):
        case = mixed(wide(make(4, tail=5)), mix)
        assert_attention(decode_attention(*states(case)), expected_of(case), FLOAT32)


@ALL
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("mixes", [False, True], ids=["one dtype", "two dtypes"])
def test_attention_is_the_same_under_autocast(dtype: torch.dtype, mixes: bool, backend: str) -> None:
    mix = MIXES[0] if mixes else (dtype,) * 5
    for kept, (length, value_dim) in itertools.product(KEPT, ((1, 8), (3, 6))):
        case = mixed(make(5, 3, 2, 3, length, tail=5, kept=kept, value_dim=value_dim), mix)
        expected = attend(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = attend(case)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@ALL
def test_scores_are_float32_under_autocast(backend: str) -> None:
    case = make(6, 3, length=3, tail=9)
    weight, position, valid = window(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = window_scores(case.query, weight, position, case.tail_keys, valid, case.prefix, SCALING).attention
    assert found.dtype == FLOAT32
    assert (found.double() - naive_scores(case, weight, position, valid, True)).abs().max() < 1e-6


@pytest.mark.parametrize(("of_query", "of_keys"), [(FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT32, FLOAT16)])
@pytest.mark.parametrize("of_prefix", [FLOAT32, BFLOAT16], ids=str)
def test_scores_of_different_dtypes(of_query: torch.dtype, of_keys: torch.dtype, of_prefix: torch.dtype) -> None:
    case = mixed(make(7, 3, length=3, tail=9), (of_query, of_prefix, BFLOAT16, of_keys, BFLOAT16))
    weight, position, valid = window(case)
    found = window_scores(case.query, weight, position, case.tail_keys, valid, case.prefix, SCALING).attention
    assert (found.double() - naive_scores(case, weight, position, valid, True)).abs().max() < 1e-6


@ALL
def test_compaction_keeps_both_dtypes(backend: str) -> None:
    case = mixed(make(8, seq=70), MIXES[0])
    block = compact_kv(case.keys, case.values, case.keep)
    assert torch.equal(block.keys, case.keys[case.keep])
    assert torch.equal(block.values, case.values[case.keep])
    assert block.nbytes == block.keys.shape[0] * (8 * 4 + 6 * 2)


def test_autocast_is_left_and_found_again() -> None:
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with as_written(CPU):
            assert (a @ a).dtype == FLOAT32
        assert (a @ a).dtype == BFLOAT16
    with as_written(CPU), as_written(torch.device("meta")):
        assert (a @ a).dtype == FLOAT32


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("first", [1, 4], ids=["a step", "a prompt"])
@pytest.mark.parametrize("second", [1, 4], ids=["a step", "a prompt"])
@pytest.mark.parametrize("dtypes", list(itertools.product((FLOAT32, BFLOAT16, FLOAT16), repeat=2)), ids=str)
def test_a_layer_holds_what_a_dynamic_one_does(
    compacted: bool, first: int, second: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Nothing is cast to fewer bits when it is written behind what is held."""
    ours, stock = PrunedLayer(), DynamicLayer()
    for number, (dtype, tokens) in enumerate(zip(dtypes, (first, second), strict=True)):
        new = draw(2, 2, tokens, 8, dtype=torch.float32), draw(2, 2, tokens, 6, dtype=dtype)
        ours.update(*new)
        stock.update(*new)
        if compacted and number == 0:
            ours.compact(whole_or_dropped(torch.ones(2, 2, tokens, dtype=torch.bool)))
    assert ours.dtypes == (FLOAT32, torch.promote_types(*dtypes))
    assert ours.full_nbytes == stock.keys.nbytes + stock.values.nbytes
    keys, values = ours.tail()
    assert (keys.dtype, values.dtype) == ours.dtypes
    if ours.prefix is not None:
        assert (ours.prefix.keys.dtype, ours.prefix.values.dtype) == ours.dtypes
        keys, values = (torch.cat(pair, dim=2) for pair in zip(ours.prefix.dense, (keys, values), strict=True))
    assert torch.equal(keys, stock.keys)
    assert torch.equal(values.to(FLOAT32), stock.values)


def test_no_memory_for_wider_states_leaves_the_layer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PrunedLayer()
    layer.update(draw(1, 2, 4, 8, dtype=FLOAT32), draw(1, 2, 4, 8, dtype=BFLOAT16))
    layer.compact(whole_or_dropped(torch.ones(1, 2, 4, dtype=torch.bool)))
    before = layer.prefix, layer.dtypes

    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(type(before[0]), "to", fail)
    with pytest.raises(CacheMemoryError, match=r"what is held in torch\.float32 and torch\.float32"):
        layer.update(draw(1, 2, 1, 8, dtype=FLOAT32), draw(1, 2, 1, 8, dtype=FLOAT32))
    assert (layer.prefix, layer.dtypes, layer.tail_length) == (*before, 0)
