# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels where their work is cut: chunks, tiles, widths. What they compute is tested in test_kernels."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_kernels import SCALING, TOLERANCE, assert_attention, make, noise

from plphp.kernels import decode
from plphp.kernels.decode import TRITON_ROWS, triton_trouble, unsupported_by_triton
from plphp.packed import PackedKV

pytest.importorskip("triton")
from plphp.kernels import _decode_triton

DTYPES = list(TOLERANCE)
ROOT = Path(__file__).parents[2]
SHARED = 99 * 1024
"""Bytes of shared memory of a block on the GPUs of capability 8.0 and later that have least (8.6, 8.9)."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [16, 32, 48])
def test_chunks_are_merged(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(_decode_triton, "ENTRIES", 16)
    monkeypatch.setattr(_decode_triton, "_chunk", lambda *_: chunk)
    case = make(20, 2, 2, 3, 2, tail=37, seq=130, dtype=dtype)
    found = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(found, case.naive(case.visible()), dtype)


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 64), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimensions(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = make(21, length=1, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, width in (("query", dim), ("keys", dim), ("values", value_dim), ("tail_keys", dim)):
        setattr(case, name, noise(generator, *getattr(case, name).shape[:3], width, dtype=dtype) * (8 / dim) ** 0.5)
    case.tail_values = noise(generator, *case.tail_values.shape[:3], value_dim, dtype=dtype)
    found = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(found, case.naive(case.visible()), dtype)


@pytest.mark.parametrize(("group", "length"), [(7, 1), (16, 1), (8, 16), (1, 70)])
def test_more_rows_than_a_tile(group: int, length: int) -> None:
    case = make(22, 1, 2, group, length, tail=length + 3)
    found = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(found, case.naive(case.visible()))


def test_rows_that_share_a_prefix() -> None:
    """As beams do."""
    case = make(23, 3, tail=4)
    order = [2, 0, 2]
    prefix = case.prefix.select(order)
    found = _decode_triton.attend(case.query, prefix, case.tail_keys, case.tail_values, None, SCALING)
    case.keys, case.values, case.keep = case.keys[order], case.values[order], case.keep[order]
    assert_attention(found, case.naive(case.visible()))


def test_room_behind_the_tail_is_not_read() -> None:
    case = make(24, length=2, tail=5)
    expected = case.naive(case.visible())
    for name in ("tail_keys", "tail_values"):
        room = torch.full((2, 2, 40, getattr(case, name).shape[3]), torch.nan)
        room[:, :, :5] = getattr(case, name)
        setattr(case, name, room[:, :, :5])
    found = _decode_triton.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert_attention(found, expected)


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
    tail = torch.zeros(1, 2, 3, dim, dtype=dtype)
    if changes.get("grad"):
        query.requires_grad_()
    assert unsupported_by_triton(query, tail, tail) == reason


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_that_does_it_right_is_taken(dtype: torch.dtype) -> None:
    assert triton_trouble.__wrapped__(torch.device("cpu"), dtype, 8, 6) is None


def test_a_kernel_that_is_wrong_is_told_once_and_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = _decode_triton.attend
    case = make(26)
    monkeypatch.setattr(_decode_triton, "attend", lambda *arguments: right(*arguments) + 1e-3)
    assert "differs from the reference on this device by 0.001" in str(
        triton_trouble.__wrapped__(torch.device("cpu"), torch.float32, 8, 6)
    )
    monkeypatch.setattr(_decode_triton, "attend", lambda *_: 1 / 0)
    reason = triton_trouble.__wrapped__(torch.device("cpu"), torch.float32, 8, 6)
    assert reason == "it fails on this device (ZeroDivisionError: division by zero)"
    monkeypatch.setattr(decode, "unsupported_by_triton", lambda *_: None)
    monkeypatch.setattr(decode, "triton_trouble", lambda *_: reason)
    monkeypatch.setattr(decode, "_tell_once", functools.cache(decode._tell_once.__wrapped__))
    for _ in range(2):
        found = decode.decode_attention(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
        assert_attention(found, case.naive(case.visible()))
    assert [record.getMessage() for record in caplog.records] == [f"Decoding without the Triton kernel: {reason}."]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_compile_for_a_gpu(dtype: str) -> None:
    """Ahead of time, without a GPU, for the oldest that is supported; the interpreter knows no limits."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "compile_kernels.py", dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line) for line in done.stdout.split()]
    assert len(shared) == 8
    assert max(shared) <= SHARED
