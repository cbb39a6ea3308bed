# SPDX-License-Identifier: Apache-2.0
"""C++ kernels, built for this processor when they are first used, as torch.compile builds its own.

They are compiled for the very instructions of the machine, which a wheel could not assume. What was built stays in
``$XDG_CACHE_HOME/plphp`` (``~/.cache/plphp``) for the next process. Loading a library is running it, so three things
have to hold first:

- It is what this process would build: its name changes with the source, the compiler, its flags and the processor.
- It is complete: a digest stands at its end, as a library that was cut off by a crash or a full disk may end the
  process that loads it, without an exception. It gets its name only when it is whole, so that processes that build at
  the same time do not see each other's halves.
- Nobody else could have written it: file and folder belong to the user, and to the user alone.

Where they do not, it is built anew; where it cannot be kept, every process builds its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from plphp.errors import BackendUnavailableError
from plphp.io.quoting import one_line

SOURCES = Path(__file__).with_name("cpp")
COMPILERS = ("g++", *(f"g++-{version}" for version in range(16, 11, -1)), "clang++", "c++")
"""Compilers that are tried in turn, unless ``$CXX`` names one."""
COMPILE = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi", "-c")
"""Flags of the compiler."""
LINK = ("-shared",)
"""Flags of the linker, without OpenMP: the symbols of the OpenMP that torch has loaded are taken, so that both use the
same threads. A second one would have threads of its own, which get in the way of torch's."""
DIGEST = hashlib.sha256
"""Digest of a library that is kept; it stands behind the library, where loaders do not look."""
TIMEOUT = 300
"""Seconds that a compiler may take."""

log = logging.getLogger("plphp")


@cache
def library(name: str) -> ctypes.CDLL:
    """Load a C++ file of the folder ``cpp``; it is built first, unless it was before.

    Parameters
    ----------
    name : str
        Name of the file, without ``.cpp``.

    Returns
    -------
    ctypes.CDLL
        The same at every call in a process.

    Raises
    ------
    BackendUnavailableError
        If there is no compiler, or none can build it; the message says what to do.
    """
    failed = []
    for compiler in _compilers():
        try:
            return _made_with(compiler, name)
        except (OSError, BackendUnavailableError) as error:
            failed.append(f"{shlex.join(compiler)}: {one_line(error, limit=200)}")
    raise BackendUnavailableError(f"it cannot be built ({'; '.join(failed)}): install g++ 12 or newer")


def _compilers() -> list[list[str]]:
    """The commands that can be tried, with their paths."""
    asked = shlex.split(os.environ.get("CXX", ""))
    commands = [asked] if asked else [[name] for name in COMPILERS]
    installed = [[path, *more] for name, *more in commands if (path := shutil.which(name)) is not None]
    if not installed:
        what = f"$CXX names {asked[0]!r}, which is not found" if asked else f"none of {', '.join(COMPILERS)} is found"
        raise BackendUnavailableError(f"there is no C++ compiler ({what}): install one, for example g++")
    return installed


def _made_with(compiler: list[str], name: str) -> ctypes.CDLL:
    """Load what this compiler has built before, or build and keep it."""
    folder = _folder()
    kept = folder and folder / f"{name}-{_key(compiler)}.so"
    if kept and os.path.lexists(kept):
        reason = _damage(kept)
        if reason is None:
            try:
                return ctypes.CDLL(str(kept))
            except OSError as error:
                reason = one_line(error, limit=200)
        log.warning("The C++ kernel that is kept in %s cannot be used (%s): it is built anew.", kept, reason)
    with tempfile.TemporaryDirectory(prefix="plphp-") as place:
        compiled, linked = Path(place) / "compiled.o", Path(place) / f"{name}.so"
        _call([*compiler, *COMPILE, str(SOURCES / f"{name}.cpp"), "-o", str(compiled)])
        _call([*compiler, *LINK, str(compiled), "-o", str(linked)])
        made = ctypes.CDLL(str(linked))  # stays when the file is gone
        reason = _keep(linked, kept) if kept else "there is no folder for it that is yours alone"
    log.info("The C++ kernel %s was built with %s: %s.", name, compiler[0], f"not kept, {reason}" if reason else kept)
    return made


def _folder() -> Path | None:
    """Where libraries are kept; None where there is no folder that the user alone can write to."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "plphp"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return folder if about.st_uid == os.getuid() and not about.st_mode & 0o022 else None


def _damage(kept: Path) -> str | None:
    """Say why a library must not be loaded; None where it is what `_keep` wrote."""
    try:
        about = kept.lstat()
        if not stat.S_ISREG(about.st_mode):
            return "it is no plain file"
        if about.st_uid != os.getuid() or about.st_mode & 0o022:
            return "others can write to it"
        content = kept.read_bytes()
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    size = DIGEST().digest_size
    return None if DIGEST(content[:-size]).digest() == content[-size:] else "it was cut off or altered"


def _keep(linked: Path, kept: Path) -> str | None:
    """Put a library into the cache, complete at once; say why where that cannot be done.

    It is written beside its place, and a rename within a file system puts it there as a whole.
    """
    try:
        content = linked.read_bytes()
        with tempfile.TemporaryDirectory(dir=kept.parent) as place:
            whole = Path(place) / kept.name
            with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content + DIGEST(content).digest())
                file.flush()
                os.fsync(file.fileno())  # or a crash may leave the name without the content
            whole.replace(kept)
    except OSError as error:
        return f"{kept} cannot be written: {error.strerror or error}"
    return None


def _key(compiler: list[str]) -> str:
    """Changes with all that a library depends on: the sources, the compiler, its flags, and the processor."""
    about = os.stat(compiler[0])
    parts = [*compiler, str(about.st_size), str(about.st_mtime_ns), *COMPILE, *LINK, platform.machine(), _features()]
    sources = [source.read_bytes() for source in sorted(SOURCES.iterdir()) if source.suffix in (".h", ".cpp")]
    return hashlib.sha256(b"\n".join(["\n".join(parts).encode(), *sources])).hexdigest()[:20]


def _features() -> str:
    """The instructions of the processor, as Linux lists them."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _call(command: list[str]) -> None:
    """Run a compiler; raise `BackendUnavailableError` with its first error where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise BackendUnavailableError(f"it took more than {TIMEOUT} seconds") from error
    if done.returncode:
        messages = done.stderr.decode(errors="replace").splitlines()
        raise BackendUnavailableError(
            next((line for line in messages if "error" in line), f"it ended with {done.returncode}")
        )
