# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels where their work is cut: chunks, tiles, widths. What they compute is tested in test_kernels."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import SCALING, TOLERANCE, assert_attention, assert_scores, make, naive_scores, noise, window

from plphp.kernels import TRIALS, choice, decode
from plphp.kernels.choice import TRITON_ROWS
from plphp.kernels.decode import triton_trial, unsupported_by_triton
from plphp.kernels.packed import PackedKV

pytest.importorskip("triton")
from plphp.kernels import _coded_triton, _compact_triton, _decode_triton, _scores_triton, _triton_shapes

DTYPES = list(TOLERANCE)
OPERATIONS = [operation for operation, language in TRIALS if language == "Triton"]
ROOT = Path(__file__).parents[2]
SHARED = 99 * 1024
"""Bytes of shared memory of a block on the GPUs of capability 8.0 and later that have least (8.6, 8.9)."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [16, 32, 48])
def test_chunks_are_merged(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(_triton_shapes, "ENTRIES", 16)
    monkeypatch.setattr(_decode_triton, "chunk_of", lambda *_: chunk)
    case = make(20, 2, 2, 3, 2, tail=37, seq=130, dtype=dtype)
    actual = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(actual, case.naive(case.visible()), dtype)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 64), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimensions(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = make(21, length=1, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, width in (("query", dim), ("keys", dim), ("values", value_dim), ("tail_keys", dim)):
        setattr(case, name, noise(generator, *getattr(case, name).shape[:3], width, dtype=dtype) * (8 / dim) ** 0.5)
    case.tail_values = noise(generator, *case.tail_values.shape[:3], value_dim, dtype=dtype)
    actual = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(actual, case.naive(case.visible()), dtype)


@pytest.mark.parametrize(("group", "length"), [(7, 1), (16, 1), (8, 16), (1, 70)])
def test_more_rows_than_a_tile(group: int, length: int) -> None:
    case = make(22, 1, 2, group, length, tail=length + 3)
    actual = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(actual, case.naive(case.visible()))


def test_rows_that_share_a_prefix() -> None:
    """As beams do."""
    case = make(23, 3, tail=4)
    order = [2, 0, 2]
    prefix = case.prefix.select(order)
    actual = _decode_triton.attend(case.query, prefix, case.tail_keys, case.tail_values, None, SCALING)
    case.keys, case.values, case.keep = case.keys[order], case.values[order], case.keep[order]
    assert_attention(actual, case.naive(case.visible()))


def test_room_behind_the_tail_is_not_read() -> None:
    case = make(24, length=2, tail=5)
    expected = case.naive(case.visible())
    for name in ("tail_keys", "tail_values"):
        room = torch.full((2, 2, 40, getattr(case, name).shape[3]), torch.nan)
        room[:, :, :5] = getattr(case, name)
        setattr(case, name, room[:, :, :5])
    actual = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(actual, expected)


def test_the_index_of_a_block() -> None:
    block = PackedKV(torch.zeros(9, 2), torch.zeros(9, 2), ((2, 1), (0, 4), (1, 1)), (2, 0, 1))
    assert block.index.tolist() == [[[7, 8], [0, 2], [3, 3]], [[1, 1], [2, 1], [0, 4]]]


def test_what_the_kernel_cannot_do_is_named() -> None:
    query, tail = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 3, 8)
    assert unsupported_by_triton(query, tail, tail) == "it needs a CUDA device"
    meta = torch.empty(1, 4, 1, 8, device="meta")
    assert unsupported_by_triton(meta, tail, tail) == "it needs a CUDA device"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "it does not know the dtype torch.float64"),
        ({"dim": 257}, "the head dimension is 257, and it goes up to 256"),
        ({"length": TRITON_ROWS}, f"a KV head has {2 * TRITON_ROWS} query rows, and it takes up to {TRITON_ROWS}"),
        ({"grad": True}, "it has no gradient"),
        # A bank's queries are float32, in a model of half precision too.
        ({"tail": torch.float16}, "the states have different dtypes: torch.float32, torch.float16, torch.float16"),
        ({"capability": (7, 5)}, "it is for NVIDIA GPUs of compute capability 8.0 and later"),
        ({}, None),
    ],
)
def test_what_a_gpu_cannot_do_is_named(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], reason: str | None
) -> None:
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    dtype, dim = changes.get("dtype", torch.float32), changes.get("dim", 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: changes.get("capability", (9, 0)))
    query = torch.zeros(1, 4, changes.get("length", 1), dim, dtype=dtype).as_subclass(OnGpu)
    tail = torch.zeros(1, 2, 3, dim, dtype=changes.get("tail", dtype))
    if changes.get("grad"):
        query.requires_grad_()
    assert unsupported_by_triton(query, tail, tail) == reason


def width(operation: str) -> int:
    """Channels of the values on which a kernel is tried: those of codes come in bytes."""
    return 16 if operation == "attend_codes" else 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kernel_that_does_it_right_is_taken(operation: str, dtype: torch.dtype) -> None:
    trial = TRIALS[operation, "Triton"]
    assert choice.trouble.__wrapped__(trial, torch.device("cpu"), dtype, 8, width(operation)) is None


@pytest.mark.parametrize(
    ("operation", "module", "name"),
    [
        ("window_scores", _scores_triton, "attention_mass"),
        ("compact_kv", _compact_triton, "gather"),
        ("decode_attention", _decode_triton, "attend"),
        ("decode_attention", _decode_triton, "attend_parts"),
        ("attend_codes", _coded_triton, "attend"),
    ],
)
def test_a_kernel_that_is_wrong_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, operation: str, module: Any, name: str
) -> None:
    right = getattr(module, name)

    def wrong(*arguments: Any) -> Any:
        actual = right(*arguments)
        return actual + 1e-3 if isinstance(actual, torch.Tensor) else (actual[0], actual[1] + 1e-3)

    monkeypatch.setattr(module, name, wrong)
    reason = choice.trouble.__wrapped__(
        TRIALS[operation, "Triton"], torch.device("cpu"), torch.float32, 8, width(operation)
    )
    assert "differs from the reference on this device by 0.001" in reason


def test_a_kernel_that_fails_is_logged_once_and_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = make(26)
    monkeypatch.setattr(_decode_triton, "attend", lambda *_: 1 / 0)
    reason = choice.trouble.__wrapped__(triton_trial, torch.device("cpu"), torch.float32, 8, 6)
    assert reason == "it fails on this device (ZeroDivisionError: division by zero)"
    monkeypatch.setattr(choice, "unsupported_by_triton", lambda *_: None)
    monkeypatch.setattr(choice, "trouble", lambda trial, *_: reason if trial is triton_trial else None)
    monkeypatch.setattr(choice, "_warn_once", functools.cache(choice._warn_once.__wrapped__))
    for _ in range(2):
        actual = decode.decode_attention(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
        assert_attention(actual, case.naive(case.visible()))
    message = f"decode_attention does without its Triton kernel: {reason}."
    assert [record.getMessage() for record in caplog.records] == [message]


@pytest.mark.parametrize(
    ("group", "length", "dtype"),
    [(1, 1, torch.float32), (7, 1, torch.float16), (2, 37, torch.float32), *((3, 5, dtype) for dtype in DTYPES)],
    ids=str,
)
def test_scores_of_chunks_and_tiles(
    monkeypatch: pytest.MonkeyPatch, group: int, length: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(_triton_shapes, "ENTRIES", 16)
    monkeypatch.setattr(_scores_triton, "chunk_of", lambda *_: 32)
    case = make(27, 3, 2, group, length, tail=79, seq=90, dtype=dtype)
    weight, position, valid = window(case)
    for prefix in (case.prefix, None):
        actual = _scores_triton.attention_mass(case.query, weight, position, case.tail_keys, valid, prefix, SCALING)
        expected = naive_scores(case, weight, position, valid, prefix is not None)
        assert_scores(actual, expected, case)


@pytest.mark.parametrize("dim", [64, 80, 256])
def test_scores_at_head_dimensions(dim: int) -> None:
    case = make(28, length=2, tail=20)
    generator = torch.Generator().manual_seed(1)
    case.values = noise(generator, 2, 2, 9, dim)
    case.query = noise(generator, 2, 4, 2, dim) / dim**0.5
    case.keys, case.tail_keys = noise(generator, 2, 2, 9, dim), noise(generator, 2, 2, 20, dim)
    weight, position, valid = window(case)
    actual = _scores_triton.attention_mass(case.query, weight, position, case.tail_keys, valid, case.prefix, SCALING)
    assert_scores(actual, naive_scores(case, weight, position, valid, True), case)


@pytest.mark.parametrize("kept", ["ragged", "empty", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_entries_are_those_of_the_reference(dtype: torch.dtype, kept: str) -> None:
    """Exactly, of strided keys, and without reading what is evicted."""
    case = make(29, 3, 2, seq=150, kept=kept, dtype=dtype)
    keys = case.keys.transpose(1, 2).contiguous().transpose(1, 2)
    keys[~case.keep] = torch.nan
    actual = _compact_triton.gather(keys, case.values, case.keep, int(case.keep.sum()))
    assert torch.equal(actual[0], keys[case.keep])
    assert torch.equal(actual[1], case.values[case.keep])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp32 bf16", "fp32 fp16", "coded bf16", "coded fp32"])
def test_kernels_compile_for_a_gpu(dtype: str) -> None:
    """Ahead of time, without a GPU, for the oldest that is supported; the interpreter knows no limits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "compile_kernels.py", *dtype.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == (7 if dtype.startswith("coded") else 4 * 5)
    assert max(shared) <= SHARED
