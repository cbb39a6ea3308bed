# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: how they cut their work, where it is launched, and how a tile is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
"""Kernels work in base 2, for which GPUs have an instruction: exp(x) is exp2(x * LOG2_E)."""
WAVES = 4
"""Programs per multiprocessor to aim for."""
ENTRIES = 64
"""Most keys of one tile."""
TILE_BYTES = 2**14
"""Most bytes of a tile of keys or queries: several have to fit into 99 KiB of shared memory."""
LARGEST_CHUNK = 4096
"""Most entries of one program."""

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
    """Entries of one program, for so many pairs of a row and a KV head with so many entries each.

    As many as leave every multiprocessor `WAVES` programs: fewer would add to the parts that have to be merged.
    """
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    share = triton.cdiv(pairs * entries, WAVES * cores)
    return min(LARGEST_CHUNK, max(2 * ENTRIES, triton.cdiv(share, ENTRIES) * ENTRIES))


def multiplies_bits(*states: torch.Tensor) -> bool:
    """Whether products have to be taken in float32: interpreted, a kernel would multiply the bits of bfloat16."""
    return any(state.device.type == "cpu" and state.dtype is torch.bfloat16 for state in states)


@triton.jit
def load_tile(at: tl.tensor, mask: tl.tensor, in_float32: tl.constexpr) -> tl.tensor:
    """Load the numbers of a tile, 0 where it is masked, and in float32 where `multiplies_bits` asks for it."""
    numbers = tl.load(at, mask=mask, other=0.0)
    if in_float32:
        numbers = numbers.to(tl.float32)
    return numbers
