# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: how they cut their work, and where it is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
WAVES = 4
"""Programs per multiprocessor to aim for."""
ENTRIES = 64
"""Most keys of one tile."""
TILE_BYTES = 2**14
"""Most bytes of a tile of keys or queries: several have to fit into 99 KiB of shared memory."""
LARGEST_CHUNK = 4096


Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def on_its_device(
    launches: Callable[Concatenate[torch.Tensor, Rest], Result],
) -> Callable[Concatenate[torch.Tensor, Rest], Result]:
    """Let a function launch where its first argument is: Triton takes the current device and its stream."""

    def launch(first: torch.Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return launches(first, *args, **kwargs)

    functools.update_wrapper(launch, launches)
    return launch


def wide_of(dim: int) -> int:
    """Width of a tile: Triton's are powers of two, and the factors of a product at least 16 wide."""
    return max(16, triton.next_power_of_2(dim))


def tile_shape(rows: int, wide: int, itemsize: int) -> tuple[int, int]:
    """Query rows and keys of one tile, for the rows of a KV head, the width of a tile and the bytes of a number."""
    most = max(16, TILE_BYTES // (wide * itemsize))
    return min(most, max(16, min(64, triton.next_power_of_2(rows)))), min(most, ENTRIES)


def chunk_of(pairs: int, entries: int, device: torch.device) -> int:
    """Entries of one program: as many as leave every multiprocessor a few programs."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = triton.cdiv(pairs * entries, WAVES * cores)
    return min(LARGEST_CHUNK, max(2 * ENTRIES, triton.cdiv(wanted, ENTRIES) * ENTRIES))


def multiplies_bits(*states: torch.Tensor) -> bool:
    """Whether products have to be taken in float32: interpreted, a kernel would multiply the bits of bfloat16."""
    return any(one.device.type == "cpu" and one.dtype is torch.bfloat16 for one in states)
