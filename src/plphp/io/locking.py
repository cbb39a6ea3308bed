# SPDX-License-Identifier: Apache-2.0
"""A lock between processes, which is a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made; a process that ends in whatever way gives it back.

    Windows and some file systems of networks have no such locks: there nothing is waited for.

    Parameters
    ----------
    path : Path
        A file for nothing but the lock. It stays: another process may be waiting for it.

    Raises
    ------
    OSError
        If the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which also ends the lock
