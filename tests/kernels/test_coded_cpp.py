# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel of coded entries against the reference in float64, which gets the same codes and the same queries."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_kernels import noise
from torch import Tensor

from plphp.kernels import (
    _coded_cpp,
    _nearest_cpp,
    centroids,
    choice,
    coded_attention,
    coded_trial,
    cpp_library,
    decode,
    merge_states,
)
from plphp.kernels.books import Books, LayerBooks
from plphp.kernels.coded import ALL, CodedKV, Reading
from plphp.kernels.coded_attention import attend_codes, counting_reads, reference
from plphp.kernels.coder import Coder
from plphp.kernels.decode import decode_attention
from plphp.kernels.packed import PackedKV
from plphp.kernels.rungs import RUNGS

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
T10 = ("pr2", "rvq", "pq")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def books(dim: int, kv_heads: int, generator: torch.Generator) -> Books:
    fine, residual = (noise(generator, kv_heads, dim // 8, 256, 8) for _ in range(2))
    coarse = noise(generator, kv_heads, dim // 16, 256, 16).half() if dim % 16 == 0 else None
    return Books(fine.half(), (0.3 * residual).half(), coarse)


def block(
    rungs: Sequence[str],
    dim: int = 64,
    value_dim: int | None = None,
    *,
    batch: int = 2,
    kv_heads: int = 2,
    seq: int = 90,
    reading: Reading = ALL,
    seed: int = 0,
    empty: bool = True,
) -> CodedKV:
    """Entries of rows and heads at random in rungs or in none of them; the last row holds none in its first head."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = value_dim or dim
    of_layer = LayerBooks(books(dim, kv_heads, generator), books(value_dim, kv_heads, generator))
    placement = torch.randint(len(rungs) + 1, (batch, kv_heads, seq), generator=generator)
    if empty:
        placement[-1, 0] = 0
    keys = noise(generator, batch, kv_heads, seq, dim) + noise(generator, kv_heads, 1, dim)
    values = noise(generator, batch, kv_heads, seq, value_dim) + noise(generator, kv_heads, 1, value_dim)
    coder = Coder(tuple(RUNGS[name] for name in rungs), of_layer, reading)
    coded = coder.encode(keys, values, torch.ones(batch, seq, dtype=torch.bool), placement.to(torch.uint8))
    assert coded is not None
    return coded


def queries(coded: CodedKV, group: int, length: int, dim: int, dtype: torch.dtype, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return noise(generator, coded.batch, coded.kv_heads * group, length, dim).to(dtype)


def assert_right(query: Tensor, coded: CodedKV, scaling: float = 0.1) -> None:
    assert _coded_cpp.unsupported(query, coded) is None
    output, lse = _coded_cpp.attend(query, coded, scaling)
    expected, exact = reference(query.double(), coded, scaling)
    bound = TOLERANCE[query.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=2e-5)
    assert output.dtype == query.dtype
    assert output.is_contiguous()


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rungs(rung: str, dtype: torch.dtype) -> None:
    coded = block([rung])
    assert_right(queries(coded, 7, 1, 64, dtype), coded)


@pytest.mark.parametrize(
    ("dim", "value_dim"), [(32, 32), (64, 32), (80, 80), (96, 128), (128, 96), (256, 256), (40, 72)]
)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_head_dimensions(dim: int, value_dim: int, share: float) -> None:
    coarse = ["pq16"] if dim % 16 == 0 else []
    coded = block([*T10, *coarse, "c3", "kivi2", "r1"], dim, value_dim, reading=Reading(share))
    assert_right(queries(coded, 3, 1, dim, torch.float32), coded, dim**-0.5)


@pytest.mark.parametrize(
    ("group", "length"), [(1, 1), (4, 1), (5, 1), (7, 1), (8, 1), (9, 1), (16, 1), (35, 1), (1, 3), (7, 3), (8, 25)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_rows(group: int, length: int, dtype: torch.dtype) -> None:
    """Up to 4, 8 or 16 are done at once, and more by parts."""
    coded = block([*T10, "c4", "kivi4"], 32, seq=60)
    assert_right(queries(coded, group, length, 32, dtype), coded)


@pytest.mark.parametrize("rung", RUNGS)
def test_recall_of_rungs(rung: str) -> None:
    """What a step reads is told by the first stream of the keys."""
    coded = block([rung], reading=Reading(0.2))
    assert_right(queries(coded, 7, 1, 64, torch.float32), coded)


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize(("group", "length"), [(1, 1), (7, 1), (7, 3), (9, 2)])
@pytest.mark.parametrize("share", [0.005, 0.2, 0.999])
def test_recall(share: float, length: int, group: int, rest: bool) -> None:
    """From the single entry of every head to all but one; every query chooses for itself."""
    coded = block(T10, 32, reading=Reading(share, rest))
    assert_right(queries(coded, group, length, 32, torch.float32), coded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_read_all_beside_rows_that_recall(dtype: torch.dtype) -> None:
    coded = block(T10, batch=4, reading=Reading(0.2))
    mixed = replace(coded, reading=(Reading(0.2), Reading(), Reading(0.5, rest=False), Reading(0.1)))
    assert_right(queries(mixed, 7, 1, 64, dtype), mixed)


def test_rows_are_reached_through_their_index() -> None:
    """Groups and means go with the stored row."""
    coded = block(["c3", "kivi2", *T10], batch=3, seq=900, reading=Reading(0.4))
    for rows in [(2, 0, 1), (1, 1, 0, 2), (2,), (0, 0)]:
        chosen = coded.select(rows)
        assert_right(queries(chosen, 7, 1, 64, torch.float32), chosen)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rungs", [T10, ("c3", "kivi2"), ("c4",)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_heads_are_cut(threads: int, rungs: Sequence[str], dtype: torch.dtype) -> None:
    """Parts of a head lie in several tiers, begin within a group of entries, and are merged."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        coded = block(rungs, 32, batch=1, kv_heads=1, seq=3000, empty=False)
        assert_right(queries(coded, 7, 1, 32, dtype), coded)
        recalled = replace(coded, reading=(Reading(0.1, rest=False),))
        assert_right(queries(coded, 7, 1, 32, dtype), recalled)
    finally:
        torch.set_num_threads(before)


def test_logits_of_any_size() -> None:
    coded = block(T10, reading=Reading())
    assert_right(queries(coded, 7, 1, 64, torch.float32) * 30, coded, 1.0)


def test_of_equal_mass_the_first_are_read() -> None:
    """All entries of a head have the same keys, so that a choice by mass alone is none."""
    generator = torch.Generator().manual_seed(0)
    seq, of_layer = 50, LayerBooks(books(32, 1, generator), books(32, 1, generator))
    keys, values = noise(generator, 1, 1, 1, 32).expand(1, 1, seq, 32), noise(generator, 1, 1, seq, 32)
    placement = torch.ones(1, 1, seq, dtype=torch.uint8)
    placement[..., 20:] = 2
    coder = Coder((RUNGS["pq"], RUNGS["rvq"]), of_layer, Reading(0.6, rest=False))
    coded = coder.encode(keys, values, torch.ones(1, seq, dtype=torch.bool), placement)
    assert coded is not None
    output, _ = _coded_cpp.attend(queries(coded, 1, 1, 32, torch.float32), coded, 0.1)
    first = placement.clone()
    first[..., 30:] = 0
    alone = Coder(coder.rungs, of_layer).encode(keys, values, torch.ones(1, seq, dtype=torch.bool), first)
    assert alone is not None
    expected, _ = reference(queries(coded, 1, 1, 32, torch.float64), alone, 0.1)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_number_shows() -> None:
    coded = block(T10, empty=False)
    query = queries(coded, 2, 1, 64, torch.float32)
    query[1, 2, 0, 5] = torch.nan
    output, lse = _coded_cpp.attend(query, coded, 0.1)
    assert output[1, 2].isnan().all()
    assert lse[1, 2].isnan().all()
    assert output.isnan().sum() == 64


@pytest.mark.parametrize("bits", [0x7FC00000, -0x400000, 0x7FFFFFFF, -1], ids=hex)
@pytest.mark.parametrize("rungs", [T10, ("r4", "r1"), ("c3", "kivi2")], ids=str)
def test_a_query_that_is_no_number_chooses_the_first_entries(rungs: Sequence[str], bits: int) -> None:
    """As the reference does, whatever the sign and the payload of the NaN; GPUs make others than CPUs."""
    coded = block(rungs, reading=Reading(0.3), empty=False)
    query = queries(coded, 2, 1, 64, torch.float32)
    query[1, 2, 0, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    output, lse = _coded_cpp.attend(query, coded, 0.1)
    expected, exact = reference(query.double(), coded, 0.1)
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=2e-5, equal_nan=True)
    assert output[1, 2].isnan().all()


def test_a_query_in_bf16_that_is_no_number_spoils_its_own_head_alone() -> None:
    coded = block(("c3", "kivi2"), seq=300, empty=False)
    query = queries(coded, 7, 1, 64, torch.bfloat16)
    query[1, 2, 0, 5] = torch.nan
    output, lse = _coded_cpp.attend(query, coded, 0.1)
    expected, exact = reference(query.double(), coded, 0.1)
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2, equal_nan=True)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=2e-5, equal_nan=True)
    assert output.isnan().any(-1).nonzero().tolist() == [[1, 2, 0]]


NO_NUMBERS = """
#include <cstring>
#include "choose.h"
int main() {
  Row<4> weights[8] = {};
  const uint32_t bits[8] = {0x7fc00000, 0xffc00001, 0x7fffffff, 0x7fc00000, 0xffffffff,
                            0x7fd00000, 0xffc00000, 0x7fc00000};
  for (int i = 0; i < 8; ++i) {
    float own;
    std::memcpy(&own, &bits[i], 4);
    weights[i][0] = own;
  }
  int32_t masses[8];
  weigh<4>(weights, 8, Row<4>{1, 1, 1, 1}, masses);
  const Choice choice = choose(masses, 8, 3);
  for (int i = 0; i < 8; ++i)
    if (choice.has(masses[i], i) != (i < 3)) return 1;
  const Floats exact = exp_of(all(weights[0][0]));
  return exact[0] == exact[0];
}
"""


def test_masses_that_are_no_numbers_are_all_alike(tmp_path: Path) -> None:
    """The first are chosen, and nothing that C++ leaves undefined is done on the way: that would end the program."""
    source, program = tmp_path / "masses.cpp", tmp_path / "masses"
    source.write_text(NO_NUMBERS)
    undefined = ["-fsanitize=undefined,float-cast-overflow", "-fsanitize-undefined-trap-on-error"]
    [compiler, *_] = cpp_library._compilers()
    flags = ["-std=c++17", "-O1", "-march=native", "-Wno-psabi", "-Wno-unused-function", *undefined]
    subprocess.run([*compiler, *flags, f"-I{cpp_library.SOURCES}", str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], check=False).returncode == 0


def test_queries_may_lie_anywhere() -> None:
    coded = block(T10)
    query = queries(coded, 7, 3, 64, torch.float32)
    assert_right(query.transpose(1, 2).contiguous().transpose(1, 2), coded)


def test_the_facade_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = _coded_cpp.attend
    monkeypatch.setattr(_coded_cpp, "attend", lambda *args: calls.append(1) or kernel(*args))
    coded = block(T10, 32, seq=40)
    attend_codes(queries(coded, 2, 1, 32, torch.float32), coded, 0.1)
    assert calls
    calls.clear()
    with counting_reads() as counts:
        attend_codes(queries(coded, 2, 1, 32, torch.float32), coded, 0.1)
    assert not calls
    assert len(counts) == 1
    for dtype, length in ((torch.float64, 1), (torch.float32, _coded_cpp.LONG + 1)):
        attend_codes(queries(coded, 2, length, 32, dtype), coded, 0.1)
    assert not calls


def test_what_it_cannot_do() -> None:
    coded = block(T10, 32, seq=40, reading=Reading(0.5))
    reason = _coded_cpp.unsupported(queries(coded, 17, 1, 32, torch.float32), coded)
    assert reason == "more than 16 query heads choose together what they read"
    assert _coded_cpp.unsupported(queries(coded, 2, 1, 32, torch.float16), coded) is not None
    long = _coded_cpp.unsupported(queries(coded, 2, 33, 32, torch.float32), coded)
    assert long == "there are 33 queries, and it is faster than torch up to 32"


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("entries", [0, 1, 6, 130])
def test_nearest_centroids(entries: int, width: int) -> None:
    """Heads of any number of entries, in any order; of centroids that are equal the first."""
    generator = torch.Generator().manual_seed(0)
    states, book = noise(generator, entries, 48), noise(generator, 3, 48 // width, 256, width)
    book[:, :, 200] = book[:, :, 7]
    states[::2, :width] = book[1, 0, 200]
    head = torch.randint(2, (entries,), generator=generator) * 2
    head[::2] = 1
    numbers = _nearest_cpp.nearest(states, book, head)
    assert torch.equal(numbers, centroids.reference(states.double(), book.double(), head))
    assert torch.equal(numbers, centroids.nearest(states, book, head))
    assert (numbers[::2, 0] == 7).all()


def test_nearest_centroids_of_wide_states_are_those_of_torch() -> None:
    states, book = torch.zeros(3, 16, dtype=torch.float64), torch.ones(1, 2, 256, 8, dtype=torch.float64)
    assert _nearest_cpp.unsupported(states, book) == "it is for float32, and the states are torch.float64"
    assert (centroids.nearest(states, book, torch.zeros(3, dtype=torch.int64)) == 0).all()
    assert centroids.cpp_trial(CPU, (torch.float32, torch.float32), 40, 40) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 40, 128])
def test_trial(dtype: torch.dtype, dim: int) -> None:
    worst = coded_attention.cpp_trial(CPU, (dtype, dtype), dim, dim)
    assert worst < choice.TOLERANCE[dtype] / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda coded: replace(coded, tiers=coded.tiers[:-1]),
        lambda coded: replace(coded, reading=(Reading(0.3),) * 2),
        lambda coded: replace(coded, rest_values=None),
        lambda coded: replace(coded, key_means=-coded.key_means),
        lambda coded: coded.select((1, 0)),
    ],
    ids=["tiers", "choice", "rest", "means", "rows"],
)
def test_the_trial_sees_what_is_wrong(change: Callable[[CodedKV], CodedKV]) -> None:
    def wrong(query: Tensor, coded: CodedKV, scaling: float) -> tuple[Tensor, Tensor]:
        return reference(query, change(coded), scaling)

    worst = coded_trial.difference(wrong, reference, CPU, (torch.float32, torch.float32), 32, 32)
    assert worst > 10 * choice.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_decode_attention_merges_all_parts(dtype: torch.dtype, length: int) -> None:
    """Prefix and tail come from the C++ kernel with their log-sum-exps; a row without coded entries is theirs alone."""
    generator = torch.Generator().manual_seed(3)
    coded = [block(T10, 32, seq=60), block(["c3"], 32, seq=30, seed=5)]
    prefix = PackedKV(noise(generator, 60, 32), noise(generator, 60, 32), ((20, 10), (0, 30)), (1, 0))
    tail_keys, tail_values = noise(generator, 2, 2, 9, 32), noise(generator, 2, 2, 9, 32)
    query = noise(generator, 2, 14, length, 32)
    states = (query, prefix.keys, prefix.values, tail_keys, tail_values)
    states = tuple(state.to(dtype) for state in states)
    actual = decode_attention(
        states[0], PackedKV(states[1], states[2], prefix.counts, prefix.rows), *states[3:], None, 0.1, coded
    )
    exact = [state.double() for state in states]
    whole = decode._with_lse(exact[0], PackedKV(exact[1], exact[2], prefix.counts, prefix.rows), *exact[3:], None, 0.1)
    outputs, lses = zip(whole, *(reference(exact[0], part, 0.1) for part in coded), strict=True)
    expected = merge_states(outputs, lses)[0].transpose(1, 2)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)
    assert actual.dtype == dtype
