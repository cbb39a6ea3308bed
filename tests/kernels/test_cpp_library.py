# SPDX-License-Identifier: Apache-2.0
"""A C++ library that was kept: it is loaded only as it was written, and built anew otherwise."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from plphp.kernels import cpp_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux")
SOURCE = 'extern "C" int attend_float32(const void*) { return 7; }\n'


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library in the place of the kernel's: what it computes does not matter here."""
    place = tmp_path_factory.mktemp("linked")
    (place / "decode.cpp").write_text(SOURCE)
    compiler = cpp_library._compilers()[0]
    made = place / "decode.so"
    subprocess.run([*compiler, "-fPIC", "-shared", str(place / "decode.cpp"), "-o", str(made)], check=True, timeout=300)
    return made


@pytest.fixture
def builds(linked: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Libraries that were linked, none of which takes a compiler."""
    made: list[Path] = []

    def call(command: list[str]) -> None:
        target = Path(command[-1])
        if target.suffix == ".so":
            made.append(target)
            shutil.copy(linked, target)

    monkeypatch.setattr(cpp_library, "_call", call)
    return made


@pytest.fixture
def kept(tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that an earlier process has kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build()
    (library,) = (tmp_path / "cache" / "plphp").iterdir()
    builds.clear()
    return library


def build() -> ctypes.CDLL:
    return cpp_library.library.__wrapped__("decode")


def cut(kept: Path) -> None:
    os.truncate(kept, kept.stat().st_size // 2)


def one_byte_short(kept: Path) -> None:
    os.truncate(kept, kept.stat().st_size - 1)


def empty(kept: Path) -> None:
    os.truncate(kept, 0)


def one_bit(kept: Path) -> None:
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)


def zeros_at_the_end(kept: Path) -> None:
    """As a file system leaves it that had noted the size before a crash, and not the content."""
    content = kept.read_bytes()
    kept.write_bytes(content[:4096] + bytes(len(content) - 4096))


def without_digest(kept: Path) -> None:
    """As versions before wrote it."""
    kept.write_bytes(kept.read_bytes()[: -cpp_library.DIGEST().digest_size])


def link(kept: Path) -> None:
    kept.rename(kept.with_suffix(".elsewhere"))
    kept.symlink_to(kept.with_suffix(".elsewhere"))


def dangling(kept: Path) -> None:
    kept.unlink()
    kept.symlink_to(kept.with_suffix(".nowhere"))


def writable(kept: Path) -> None:
    kept.chmod(0o666)


DAMAGES = (cut, one_byte_short, empty, one_bit, zeros_at_the_end, without_digest, link, dangling, writable)


def test_what_was_kept_is_loaded_without_a_word(
    kept: Path, builds: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    assert build().attend_float32(None) == 7
    assert not builds
    assert not caplog.records
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_never_loaded(
    damage: Callable[[Path], None],
    kept: Path,
    builds: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(kept)
    loaded, load = [], ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(path) or load(path))
    assert build().attend_float32(None) == 7
    assert loaded == [str(builds[0])]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(kept) in record.getMessage()
    assert "it is built anew" in record.getMessage()
    assert not kept.is_symlink()
    caplog.clear()
    assert build().attend_float32(None) == 7  # as the next process does
    assert len(builds) == 1
    assert not caplog.records


def test_a_whole_library_that_cannot_be_loaded_is_built_anew(
    kept: Path, builds: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    content = b"no library at all" * 100
    kept.write_bytes(content + cpp_library.DIGEST(content).digest())
    assert build().attend_float32(None) == 7
    assert len(builds) == 1
    assert "cannot be used" in caplog.text


def test_a_library_that_cannot_be_read(
    kept: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key, read = kept.stem.split("-")[1], Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == kept:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(cpp_library, "_key", lambda _: key)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert build().attend_float32(None) == 7
    assert "it cannot be read: Permission denied" in caplog.text
    assert len(builds) == 1


def test_a_folder_in_its_place_is_left_alone(kept: Path, builds: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    kept.unlink()
    kept.mkdir()
    (kept / "note.txt").write_text("mine")
    assert build().attend_float32(None) == 7
    assert "it is no plain file" in caplog.text
    assert (kept / "note.txt").read_text() == "mine"
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_keeps_nothing(
    where: str, tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    caplog.set_level(logging.INFO, logger="plphp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os if where == "fsync" else Path, where, full)
    assert build().attend_float32(None) == 7
    assert "not kept" in caplog.text
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "plphp").iterdir())


def test_two_that_build_at_once(tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: build(), range(8)))
    assert [library.attend_float32(None) for library in made] == [7] * 8
    (kept,) = (tmp_path / "plphp").iterdir()
    assert cpp_library._damage(kept) is None


def test_a_library_that_is_cut_off_does_not_end_the_process(kept: Path, tmp_path: Path) -> None:
    """Loading it would: what is mapped behind the end of a file raises SIGBUS when it is touched."""
    os.truncate(kept, 4096)
    code = (
        "import shutil, sys; from pathlib import Path; from plphp.kernels import cpp_library;"
        f"cpp_library._key = lambda _: {kept.stem.split('-')[1]!r};"
        f"cpp_library._call = lambda command: shutil.copy({str(tmp_path / 'whole.so')!r}, command[-1]);"
        "print(cpp_library.library('decode').attend_float32(None))"
    )
    subprocess.run(
        [cpp_library._compilers()[0][0], "-fPIC", "-shared", "-x", "c++", "-", "-o", str(tmp_path / "whole.so")],
        input=SOURCE.encode(), check=True, timeout=300,
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, b"7")
