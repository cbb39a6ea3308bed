# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of coded entries, interpreted, against the reference in float64, which gets the same codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_coded_cpp import T10, block, queries
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plphp.kernels import choice, coded_attention, decode, merge_states
from plphp.kernels.coded import CodedKV, Reading
from plphp.kernels.coded_attention import attend_codes, reference
from plphp.kernels.decode import decode_attention
from plphp.kernels.packed import PackedKV
from plphp.kernels.rungs import RUNGS

pytest.importorskip("triton")
from plphp.kernels import _coded_triton, _decode_triton, _triton_shapes

NO_NUMBERS = (0x7FC00000, -0x400000, 0x7FFFFFFF, -1)
"""The bits of NaN of both signs, with the smallest and the largest payload of a quiet one."""
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_right(query: Tensor, coded: CodedKV, scaling: float = 0.1) -> None:
    output, lse = _coded_triton.attend(query, coded, scaling)
    expected, exact = reference(query.double(), coded, scaling)
    bound = DTYPES[query.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), exact, rtol=bound / 10, atol=bound)
    assert output.dtype == query.dtype
    assert output.is_contiguous()


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rungs(rung: str, dtype: torch.dtype) -> None:
    coded = block([rung], 32, seq=90)
    assert_right(queries(coded, 3, 1, 32, dtype), coded)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 128), (80, 40), (40, 256)])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_head_dimensions(dim: int, value_dim: int, share: float) -> None:
    coarse = ["pq16"] if dim % 16 == value_dim % 16 == 0 else []
    coded = block([*T10, *coarse, "c3", "kivi2", "r1"], dim, value_dim, reading=Reading(share), seq=100)
    assert_right(queries(coded, 2, 1, dim, torch.float32), coded, dim**-0.5)


@pytest.mark.parametrize("rung", RUNGS)
def test_recall_of_rungs(rung: str) -> None:
    """What a step reads is told by the first stream of the keys."""
    coded = block([rung], 32, reading=Reading(0.2), seq=100)
    assert_right(queries(coded, 3, 1, 32, torch.float32), coded)


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize(("group", "length"), [(1, 1), (7, 1), (5, 3)])
@pytest.mark.parametrize("share", [0.005, 0.2, 0.999])
def test_recall(share: float, group: int, length: int, rest: bool) -> None:
    """From the single entry of every head to all but one; every query chooses for itself."""
    coded = block(T10, 32, reading=Reading(share, rest), seq=100)
    assert_right(queries(coded, group, length, 32, torch.float32), coded)


@pytest.mark.parametrize("length", [1, 2])
def test_rows_that_read_all_beside_rows_that_recall(length: int) -> None:
    coded = block(T10, 32, batch=4, reading=Reading(0.2), seq=60)
    mixed = replace(coded, reading=(Reading(0.2), Reading(), Reading(0.5, rest=False), Reading(0.1)))
    assert_right(queries(mixed, 3, length, 32, torch.float32), mixed)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize(("rungs", "seq"), [(("c3", "kivi2", *T10), 60), (("c3", "c4"), 450)], ids=str)
def test_rows_are_reached_through_their_index(share: float, rungs: Sequence[str], seq: int) -> None:
    """Groups and means go with the stored row."""
    coded = block(rungs, 32, batch=3, reading=Reading(share), seq=seq)
    for rows in [(2, 0, 1), (1, 1, 0), (2,)]:
        chosen = coded.select(rows)
        assert_right(queries(chosen, 3, 1, 32, torch.float32), chosen)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_chunks_and_blocks_are_put_together(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Of entries, of masses, and of long queries."""
    monkeypatch.setattr(_triton_shapes, "ENTRIES", 16)
    monkeypatch.setattr(_coded_triton, "chunk_of", lambda *_: 32)
    monkeypatch.setattr(_coded_triton, "BLOCK", 16)
    coded = block(T10, 32, reading=Reading(share), seq=150)
    monkeypatch.setattr(_coded_triton, "MAX_LOGITS", 2 * 2 * 6 * 150)
    assert_right(queries(coded, 3, 5, 32, torch.float32), coded)


def test_of_equal_mass_the_first_are_read() -> None:
    """All entries have the same keys, so that a choice by mass alone is none."""
    coded = block(("pq",), 32, batch=1, kv_heads=1, empty=False, reading=Reading(0.3, rest=False), seq=50)
    [tier] = coded.tiers
    same = replace(tier.keys, streams=(tier.keys.streams[0][:1].expand_as(tier.keys.streams[0]).contiguous(),))
    equal = replace(coded, tiers=(replace(tier, keys=same),))
    assert_right(queries(equal, 3, 1, 32, torch.float32), equal)


def test_what_is_no_number_is_not_read_out_of_bounds() -> None:
    coded = block(T10, 32, reading=Reading(0.3), seq=40)
    query = queries(coded, 3, 1, 32, torch.float32)
    expected, _ = _coded_triton.attend(query, coded, 0.1)
    query[0, 0] = torch.nan
    output, _ = _coded_triton.attend(query, coded, 0.1)
    assert output[0, 0].isnan().all()
    assert torch.equal(output[1], expected[1])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter's numpy
@pytest.mark.parametrize("bits", NO_NUMBERS, ids=hex)
def test_a_query_that_is_no_number_chooses_the_first_entries(bits: int) -> None:
    """As the reference does. Other heads of its group read the same entries, which shows in what they give."""
    coded = block(T10, 32, reading=Reading(0.3), seq=40)
    query = queries(coded, 3, 1, 32, torch.float32)
    query[0, 0, 0, 5] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    output, lse = _coded_triton.attend(query, coded, 0.1)
    expected, exact = reference(query.double(), coded, 0.1)
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert output[0, 0].isnan().all()
    torch.testing.assert_close(lse[:, 1:].double(), exact[:, 1:], rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("wanted", [1, 4, 6, 7, 9, 10])
@pytest.mark.parametrize("block", [4, 16])
def test_masses_that_are_no_numbers_are_all_alike(wanted: int, block: int) -> None:
    """More than any number, and of themselves the first: torch's order, whatever their sign and their payload."""
    own = [*(0x3F000000, *NO_NUMBERS[:2], 0x3E800000, 0x7F800001), *(*NO_NUMBERS[2:], -0x7FFFFF, 0, 0x3F000000)]
    held = len(own)
    mass = torch.tensor([[*own, *([-1] * 4)]], dtype=torch.int32).view(torch.float32)  # NaN behind what is held
    fields = [0, held, wanted, 0, 0, held, 0, 0]
    table = torch.tensor(fields, dtype=torch.int32)[:, None].contiguous()
    places = torch.full((1, 1, wanted), -1, dtype=torch.int32)
    ends = torch.zeros(1, 1, 1, dtype=torch.int32)
    logits = torch.zeros(1, 1, 1, mass.shape[1])
    _coded_triton.choose[(1,)](
        mass, table, places, ends, logits, 1, 1, mass.shape[1], wanted, 1, GROUP=1, RESTS=True, BLOCK=block
    )
    expected = mass[0, :held].argsort(descending=True, stable=True)[:wanted].sort().values
    assert places.flatten().tolist() == expected.tolist()
    assert ends.item() == wanted
    assert logits.flatten().isinf().nonzero().flatten().tolist() == expected.tolist()


class _NothingFromTheHost(TorchDispatchMode):
    """Fails where a tensor is made of numbers of the host, or looked at from there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("lift_fresh", "_local_scalar_dense", "nonzero", "item", "equal"), name
        return func(*args, **(kwargs or {}))


class _Launches:
    """Stands for a kernel whose launches do nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("path", ["torch", "Triton"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_step_can_be_captured(monkeypatch: pytest.MonkeyPatch, share: float, path: str) -> None:
    """Once it has run: then rows that read everything beside rows that recall bring nothing from the host."""
    coded = block([*T10, "c3", "kivi2"], 32, batch=3, reading=Reading(share), seq=40)
    coded = replace(coded, reading=(Reading(), *coded.reading[1:])).select((2, 0, 1))
    query = queries(coded, 3, 1, 32, torch.float32)
    attend = reference if path == "torch" else _coded_triton.attend
    if path == "Triton":
        for name in ("attend_tier", "index_logits", "choose", "turn", "merge_tiers"):
            monkeypatch.setattr(_coded_triton, name, _Launches())
    with pytest.raises(AssertionError, match="lift_fresh"), _NothingFromTheHost():
        attend(query, coded, 0.1)
    attend(query, coded, 0.1)
    with _NothingFromTheHost():
        attend(query, coded, 0.1)


def test_what_is_kept_of_a_block_is_small() -> None:
    """Nothing of the size of its entries."""
    coded = block(T10, 32, reading=Reading(0.4), seq=150)
    query = queries(coded, 3, 1, 32, torch.float32)
    reference(query, coded, 0.1)
    _coded_triton.attend(query, coded, 0.1)
    plan = coded.__dict__[_coded_triton._PLAN]
    readers, back = coded.readers
    kept = [plan.table, back, *(tensor for own in readers for tensor in own if isinstance(tensor, Tensor))]
    assert sum(tensor.nbytes for tensor in kept) < 100 * coded.batch * coded.kv_heads


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Dispatch takes Triton's kernels, interpreted; the result notes what was called."""
    monkeypatch.setattr(choice, "unsupported_by_triton", lambda *_: None)
    monkeypatch.setattr(choice, "trouble", lambda *_: None)
    calls: list[str] = []

    def note(name: str, own: Any, *arguments: Any) -> Any:
        calls.append(name)
        return own(*arguments)

    for module, name in ((_coded_triton, "attend"), (_decode_triton, "attend_parts")):
        monkeypatch.setattr(module, name, partial(note, name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("masked", [False, True])
def test_all_parts_of_a_layer(on_triton: list[str], masked: bool) -> None:
    """Whole entries, the codes of two prompts, and a tail."""
    generator = torch.Generator().manual_seed(3)
    blocks = [block(T10, 32, seq=60, reading=Reading(0.3)), block(("c3",), 32, seq=60, seed=1)]
    query = queries(blocks[0], 3, 2, 32, torch.float32)
    prefix = PackedKV(*(torch.randn(12, 32, generator=generator) for _ in range(2)), ((3, 0), (4, 5)), (0, 1))
    tail = [torch.randn(2, 2, 5, 32, generator=generator) for _ in range(2)]
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    actual = decode_attention(query, prefix, *tail, mask if masked else None, 0.1, blocks)
    assert on_triton == ["attend_parts", "attend", "attend"]
    shown = decode.tail_bias(mask if masked else None, 2, 5, torch.float64)
    wide = prefix.to(torch.float64, torch.float64)
    states = query.double(), wide, *(part.double() for part in tail)
    whole, lse = decode.attend_parts(*states, shown, 0.1, want_lse=True)
    parts = [(whole.flatten(1, 2), lse.flatten(1, 2)), *(reference(query.double(), own, 0.1) for own in blocks)]
    expected = merge_states(*map(list, zip(*parts, strict=True)))[0].transpose(1, 2)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5)


def test_what_the_kernels_cannot_do_is_named(on_triton: list[str]) -> None:
    coded = block(T10, 32, seq=40)
    most = choice.TRITON_ROWS
    query = queries(coded, 1, most + 1, 32, torch.float32)
    reason = f"a KV head has {most + 1} query rows, and it takes up to {most}"
    assert coded_attention.unsupported_by_triton(query, coded) == reason
    attend_codes(query, coded, 0.1)
    assert not on_triton
    attend_codes(query[:, :, :1], coded, 0.1)
    assert on_triton == ["attend"]
