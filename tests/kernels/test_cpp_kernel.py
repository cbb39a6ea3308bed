# SPDX-License-Identifier: Apache-2.0
"""The C++ kernel where its work is cut, and how it is built. What it computes is tested in test_kernels, too."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import SCALING, Case, assert_attention, make, noise
from torch import Tensor

from plphp.errors import BackendUnavailableError
from plphp.kernels import _decode_cpp, choice, cpp_library, decode
from plphp.kernels.decode import CPP_ROWS, cpp_trial, decode_attention, unsupported_by_cpp

DTYPES = (torch.float32, torch.bfloat16)
CPU = torch.device("cpu")
TOO_LONG = (
    f"a KV head has {2 * CPP_ROWS} query rows, and it is faster than torch up to {CPP_ROWS} where heads are equal"
)


def wide(case: Case, dim: int = 64, value_dim: int = 64) -> Case:
    """The same with more dimensions, whose logits are as large."""
    generator = torch.Generator().manual_seed(1)
    for name in ("query", "keys", "values", "tail_keys", "tail_values"):
        states = getattr(case, name)
        width = value_dim if "values" in name else dim
        scale = 1.0 if "values" in name else (8 / dim) ** 0.5
        setattr(case, name, noise(generator, *states.shape[:3], width, dtype=states.dtype) * scale)
    return case


def attend(case: Case) -> torch.Tensor:
    return _decode_cpp.attend(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)


def assert_right(case: Case) -> None:
    """With a single query, which needs no mask."""
    assert_attention(attend(case), case.naive(case.visible()), case.query.dtype)


@pytest.mark.parametrize(
    ("dim", "value_dim"),
    [(32, 32), (33, 47), (64, 64), (80, 80), (96, 96), (128, 64), (64, 160), (256, 256), (288, 40)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dimensions(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    assert_right(wide(make(31, tail=40, seq=60, dtype=dtype), dim, value_dim))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 9, 16, 17, 35])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_rows(group: int, dtype: torch.dtype) -> None:
    """More than 16 do not fit into tiles, more than 8 not into registers."""
    assert_right(wide(make(32, 2, 1, group, tail=7, seq=50, dtype=dtype)))


@pytest.mark.parametrize("seq", [1, 15, 16, 17, 31, 33, 64, 127, 128, 129, 300, 1500])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries(seq: int, threads: int, dtype: torch.dtype, of_torch: Callable[[int], None]) -> None:
    """As many fill blocks and pieces in part; what is read beside them is not counted."""
    of_torch(threads)
    case = wide(make(33, 2, 2, 2, tail=seq // 2 + 1, seq=seq, dtype=dtype), 40, 40)
    assert_right(case)


@pytest.fixture
def of_torch() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_any_size(dtype: torch.dtype) -> None:
    """A maximum that grows from block to block, and weights that vanish."""
    case = wide(make(34, 1, 1, 2, tail=10, seq=400, kept="dense", dtype=dtype))
    case.keys *= torch.linspace(0.1, 40, 400)[:, None].to(dtype)
    assert_right(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_room_behind_the_tail_is_not_read(dtype: torch.dtype) -> None:
    case = wide(make(35, tail=5, dtype=dtype))
    expected = case.naive(case.visible())
    for name in ("tail_keys", "tail_values"):
        room = torch.full((2, 2, 40, 64), torch.nan, dtype=dtype)
        room[:, :, :5] = getattr(case, name)
        setattr(case, name, room[:, :, :5])
    assert_attention(attend(case), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_shows(bad: float, dtype: torch.dtype) -> None:
    """In the head that it is in, and in no more."""
    case = wide(make(36, 2, 2, 3, tail=4, seq=9, kept="dense", dtype=dtype))
    case.tail_values[1, 0, 2, 7] = bad
    actual = attend(case)
    strange = ~actual.isfinite()
    assert strange[1, :, :3, 7].all()
    assert strange.sum() == 3
    case.tail_values[1, 0, 2, 7] = 0
    case.tail_keys[1, 0, 2, 7] = torch.nan
    actual = attend(case)
    assert actual[1, :, :3].isnan().all()
    assert actual.isnan().sum() == 3 * 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tail_that_has_no_weight(dtype: torch.dtype) -> None:
    """A logit of -inf is a weight of 0, also where the tail has no more logits."""
    case = wide(make(43, 1, 1, 2, tail=1, seq=40, kept="dense", dtype=dtype))
    case.query[..., 5] = 1
    case.tail_keys[..., 5] = -torch.inf
    assert_right(case)


def test_a_mask_of_one_column_is_spread() -> None:
    case = wide(make(44, tail=70))
    mask = torch.full((1, 1, 1, 1), -1.5)
    actual = _decode_cpp.attend(case.query, case.prefix, case.tail_keys, case.tail_values, mask, SCALING)
    bias = torch.cat([torch.zeros(2, 4, 1, case.keys.shape[2]), mask.expand(2, 4, 1, 70)], dim=-1)
    assert_attention(actual, case.naive(case.visible(), bias))


def test_rows_that_share_a_prefix() -> None:
    """As beams do."""
    case = wide(make(37, 3, tail=4))
    order = [2, 0, 2]
    prefix = case.prefix.select(order)
    actual = _decode_cpp.attend(case.query, prefix, case.tail_keys, case.tail_values, None, SCALING)
    case.keys, case.values, case.keep = case.keys[order], case.values[order], case.keep[order]
    assert_attention(actual, case.naive(case.visible()))


@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of another processor")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrower_vectors(march: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What processors without AVX-512, and without AVX, would run."""
    if march == "x86-64-v3" and "avx2" not in cpp_library._features():
        pytest.skip("this processor has no AVX2")
    flags = tuple(f"-march={march}" if flag == "-march=native" else flag for flag in cpp_library.COMPILE)
    monkeypatch.setattr(cpp_library, "COMPILE", flags)
    monkeypatch.setattr(_decode_cpp, "library", cpp_library.library.__wrapped__)
    for dim, group in ((40, 3), (64, 9)):
        assert_right(wide(make(38, 2, 2, group, tail=9, seq=150, dtype=dtype), dim, dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 96])
def test_the_trial_passes(dtype: torch.dtype, dim: int) -> None:
    assert choice.trouble.__wrapped__(cpp_trial, CPU, dtype, dim, dim) is None


@pytest.mark.parametrize("kept", ["dense", "ragged", "row"])
def test_long_queries_take_it_where_heads_are_ragged(monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    assert choice.trouble(cpp_trial, CPU, torch.float32, 64, 64) is None
    calls = []
    kernel = _decode_cpp.attend
    monkeypatch.setattr(_decode_cpp, "attend", lambda *a: calls.append(a[0].shape[2]) or kernel(*a))
    for length in (1, 2, CPP_ROWS // 2, CPP_ROWS // 2 + 1):
        case = wide(make(39, length=length, tail=20, kept=kept))
        actual = decode_attention(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
        assert_attention(actual, case.naive(case.visible()))
    assert calls == [1, 2, CPP_ROWS // 2, CPP_ROWS // 2 + 1][: 3 if kept == "dense" else 4]


@pytest.mark.parametrize(("group", "length"), [(1, 64), (3, 21), (3, 22), (1, 65), (2, 70), (16, 5), (33, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_queries(group: int, length: int, dtype: torch.dtype) -> None:
    """Query rows are taken some at a time; each has a mask of its own."""
    case = wide(make(45, 2, 2, group, length, tail=length + 9, seq=150, kept="empty", dtype=dtype))
    shown = torch.rand(2, 2 * group, length, length + 9, generator=torch.Generator().manual_seed(2)) < 0.5
    shown |= torch.arange(length + 9) == torch.arange(9, length + 9)[:, None]  # every query sees itself
    shown = case.visible(shown)[..., 150:]
    bias = decode.tail_bias(shown, length, length + 9, torch.float32)
    actual = _decode_cpp.attend(case.query, case.prefix, case.tail_keys, case.tail_values, bias, SCALING)
    assert_attention(actual, case.naive(case.visible(shown)), dtype)


@pytest.mark.parametrize("sums", [1, 20_000])
@pytest.mark.parametrize("masked", ["causal", "by head", "one row"])
def test_long_queries_are_cut_to_bound_the_sums(monkeypatch: pytest.MonkeyPatch, sums: int, masked: str) -> None:
    case = wide(make(46, length=30, tail=33, seq=70))
    mask = case.visible()[..., 70:]
    if masked == "by head":
        mask[1, 2, 5:, :20] = False
    visible = case.visible(mask)
    mask = mask[:, :1] if masked == "causal" else mask
    if masked == "one row":
        mask, visible = mask[:1, :1, -1:], case.visible().clone()
        visible[..., 70:] = True
    bias = decode.tail_bias(mask, 30, 33, torch.float32)
    lengths = []
    library = _decode_cpp.library
    monkeypatch.setattr(_decode_cpp, "library", lambda name: lengths.append(name) or library(name))
    monkeypatch.setattr(_decode_cpp, "PARTIAL_SUMS", sums)
    actual = _decode_cpp.attend(case.query, case.prefix, case.tail_keys, case.tail_values, bias, SCALING)
    assert_attention(actual, case.naive(visible))
    assert len(lengths) == 30 if sums == 1 else 1 < len(lengths) < 30


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "it does not know the dtype torch.float64"),
        ({"dtype": torch.float16}, "it does not know the dtype torch.float16"),
        ({"dim": 31}, "the head dimension is 31, and it starts at 32"),
        (
            {"length": CPP_ROWS},
            TOO_LONG,
        ),
        ({"grad": True}, "it has no gradient"),
        ({"device": "meta"}, "it is for a CPU"),
        ({"strided": True}, "the numbers of a head do not lie side by side"),
        ({}, None),
    ],
)
def test_what_it_cannot_do_is_named(changes: dict[str, object], reason: str | None) -> None:
    case = wide(make(40, length=changes.get("length", 1), tail=20, kept="dense"), changes.get("dim", 64), 64)
    query = case.query.to(changes.get("device", "cpu"), changes.get("dtype", torch.float32))
    keys = case.tail_keys.mT.contiguous().mT if changes.get("strided") else case.tail_keys
    if changes.get("grad"):
        query.requires_grad_()
    assert unsupported_by_cpp(query, case.prefix, keys, case.tail_values) == reason


def test_states_of_different_dtypes_are_named() -> None:
    case = wide(make(40))
    half = dataclasses.replace(case.prefix, keys=case.prefix.keys.bfloat16())
    reason = unsupported_by_cpp(case.query, half, case.tail_keys, case.tail_values)
    assert reason is not None
    assert reason.startswith("the states have different dtypes: torch.float32, torch.float32, torch.bfloat16")


def test_a_model_in_float64_decodes() -> None:
    """So is the reference of the trials."""
    case = wide(make(41, dtype=torch.float64))
    actual = decode_attention(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
    assert actual.dtype == torch.float64
    assert (actual - case.naive(case.visible())).abs().max() < 1e-6


class TestBuilding:
    """Without the library of this process, and with a cache folder of the test's own."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("CXX", raising=False)
        return tmp_path / "cache" / "plphp"

    def build(self) -> object:
        return cpp_library.library.__wrapped__("decode")

    def test_it_is_built_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.build()
        (made,) = folder.iterdir()
        assert made.suffix == ".so"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was built again"))
        self.build()

    def test_another_processor_gets_its_own(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.build()
        monkeypatch.setattr(cpp_library, "_features", lambda: "flags: fpu")
        self.build()
        assert len(list(folder.iterdir())) == 2

    @pytest.mark.parametrize("why", ["a file in the way", "others may write to it", "it cannot be written to"])
    def test_without_a_folder_it_is_not_kept(self, why: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if why == "a file in the way":
            folder.parent.write_text("")
        else:
            folder.mkdir(parents=True, mode=0o700)
        if why == "others may write to it":
            folder.chmod(0o770)
        if why == "it cannot be written to":
            monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
        self.build()
        assert not folder.is_dir() or not list(folder.iterdir())

    def test_a_folder_of_somebody_else_is_not_trusted(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cpp_library._folder() == folder
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        assert cpp_library._folder() is None

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(BackendUnavailableError, match=r"no C\+\+ compiler \(none of g\+\+, .* is found\): install"):
            self.build()
        monkeypatch.setenv("CXX", "nonesuch -O3")
        with pytest.raises(BackendUnavailableError, match=r"\$CXX names 'nonesuch', which is not found"):
            self.build()

    @pytest.fixture
    def broken(self, tmp_path: Path) -> Path:
        """A compiler that builds nothing."""
        compiler = tmp_path / "bin" / "g++"
        compiler.parent.mkdir()
        compiler.write_text("#!/bin/sh\necho In file included from >&2\necho error: too old >&2\nexit 1\n")
        compiler.chmod(0o755)
        return compiler

    def test_a_compiler_that_fails(self, folder: Path, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", f"{broken} -v")
        with pytest.raises(BackendUnavailableError, match=r"g\+\+ -v: error: too old\): install g\+\+ 12"):
            self.build()
        assert not list(folder.iterdir())

    def test_the_next_compiler_is_tried(self, folder: Path, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (broken.parent / "c++").symlink_to(shutil.which("g++") or "")
        monkeypatch.setenv("PATH", str(broken.parent), prepend=os.pathsep)
        monkeypatch.setattr(cpp_library, "COMPILERS", ("g++", "c++"))
        self.build()
        assert len(list(folder.iterdir())) == 1

    def test_a_damaged_library_is_built_again(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir(parents=True, mode=0o700)
        (folder / "decode-key.so").write_bytes(b"cut off")
        monkeypatch.setattr(cpp_library, "_key", lambda _: "key")
        self.build()
        assert (folder / "decode-key.so").stat().st_size > 1000

    def test_it_shares_the_threads_of_torch(self) -> None:
        """A second OpenMP would have threads of its own, beside torch's."""
        code = (
            "import torch; from plphp.kernels import cpp_library; before = open('/proc/self/maps').read();"
            "cpp_library.library('decode'); after = open('/proc/self/maps').read();"
            "names = lambda maps: {line.split()[-1] for line in maps.splitlines() if 'omp' in line};"
            "assert names(before) == names(after), names(after) - names(before)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=300)

    def test_without_it_torch_does_it_and_says_so_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(_decode_cpp, "library", cpp_library.library.__wrapped__)
        monkeypatch.setattr(choice, "trouble", functools.cache(choice.trouble.__wrapped__))
        monkeypatch.setattr(choice, "_warn_once", functools.cache(choice._warn_once.__wrapped__))
        case = wide(make(42))
        for _ in range(2):
            actual = decode.decode_attention(case.query, case.prefix, case.tail_keys, case.tail_values, None, SCALING)
            assert_attention(actual, case.naive(case.visible()))
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith("decode_attention does without its C++ kernel: there is no C++ compiler")

    def test_a_wrong_one_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = _decode_cpp.attend
        monkeypatch.setattr(_decode_cpp, "attend", lambda *a: right(*a) + 1e-3)
        reason = choice.trouble.__wrapped__(cpp_trial, CPU, torch.float32, 64, 64)
        assert reason == "it differs from the reference on this device by 0.001"

    def test_one_whose_log_sum_exps_are_wrong_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is in few bits is merged by them, and the output alone does not show them."""
        right = _decode_cpp.attend_parts

        def wrong(*arguments: Any, want_lse: bool = True) -> tuple[Tensor, Tensor]:
            output, lse = right(*arguments, want_lse=want_lse)
            return output, lse + 1e-3

        monkeypatch.setattr(_decode_cpp, "attend_parts", wrong)
        reason = choice.trouble.__wrapped__(cpp_trial, CPU, torch.float32, 64, 64)
        assert reason == "it differs from the reference on this device by 0.001"
