# SPDX-License-Identifier: Apache-2.0
"""Memory of a tail: buffers with room behind what they hold, and an error with a name where there is no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from plphp.errors import CacheMemoryError
from plphp.io.quoting import one_line

MIN_GROWTH = 16
"""Tokens for which the tail reserves room at least when it grows."""
NO_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch says on a CPU."""


def appended(buffer: Tensor | None, new: Tensor, used: int) -> Tensor:
    """Write ``new`` behind the first ``used`` entries of a buffer, or of a larger one if there is no room."""
    needed = used + new.shape[2]
    if buffer is None or buffer.shape[2] < needed:
        buffer = grown(new[:, :, :0] if buffer is None else buffer, used, needed + max(MIN_GROWTH, needed // 8))
    elif buffer.is_inference() and not torch.is_inference_mode_enabled():
        buffer = buffer.clone()  # a turn under inference_mode, then one outside of it
    buffer[:, :, used:needed] = new
    return buffer


def grown(buffer: Tensor, used: int, room: int) -> Tensor:
    """Copy the first ``used`` entries of a buffer to a new one with room for ``room``, zeros behind them."""
    with memory_named(f"keys and values of {tuple(buffer.shape[:2])} rows and heads with room for {room} tokens"):
        larger = buffer.new_zeros((*buffer.shape[:2], room, buffer.shape[3]))
    larger[:, :, :used] = buffer[:, :, :used]
    return larger


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
