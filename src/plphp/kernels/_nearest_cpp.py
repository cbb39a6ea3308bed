# SPDX-License-Identifier: Apache-2.0
"""Calls cpp/nearest.cpp: the nearest centroid of each part of each entry, on a CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import choice
from .cpp_library import library

WIDEST_PART = 16
"""Most channels of a part."""


def unsupported(states: Tensor, book: Tensor) -> str | None:
    """Say why the kernel cannot search, see `plphp.kernels.centroids.nearest`; None where it can."""
    if states.dtype != torch.float32:
        return f"it is for float32, and the states are {states.dtype}"
    if book.shape[3] > WIDEST_PART:
        return f"a part has {book.shape[3]} channels, and it takes up to {WIDEST_PART}"
    return choice.unsupported_by_cpp(states)


def nearest(states: Tensor, book: Tensor, head: Tensor) -> Tensor:
    """The nearest centroids; all as in `plphp.kernels.centroids.nearest`, in float32.

    Returns
    -------
    Tensor
        uint8 [entries, parts].
    """
    heads, parts, _, width = book.shape
    states, book, head = states.contiguous(), book.contiguous(), head.contiguous()
    numbers = torch.empty(len(states), parts, dtype=torch.uint8)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (states, book, head, numbers))
    sizes = (ctypes.c_int64(size) for size in (len(states), heads, parts, width, torch.get_num_threads()))
    library("nearest").nearest_float32(*pointers, *sizes)
    return numbers
