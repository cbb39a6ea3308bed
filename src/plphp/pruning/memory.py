# SPDX-License-Identifier: Apache-2.0
"""Where torch finds no memory for keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plphp.errors import CacheMemoryError
from plphp.io.quoting import one_line

NO_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch says on a CPU."""


@contextmanager
def memory_named(what: str) -> Iterator[None]:
    """Raise `CacheMemoryError` where torch finds no memory."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise CacheMemoryError(
            f"There is no memory for {what} ({one_line(error)}): free some, or decode fewer rows or shorter answers."
        ) from error


def lacks_memory(error: RuntimeError) -> bool:
    """Whether torch raised it because there is no memory; on a CPU only the words tell."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)
