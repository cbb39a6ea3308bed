# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for compute capability 8.0 and print the shared memory of each: a process of its own,
as Triton either interprets or compiles."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plphp.kernels import _decode_triton as kernels

TARGET = GPUTarget("cuda", 80, 32)


def shared_bytes(kernel: triton.JITFunction, constants: dict[str, int], pointers: dict[str, str]) -> int:
    """Compile a kernel whose other arguments are integers."""
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **pointers, **dict.fromkeys(constants, "constexpr")}
    return triton.compile(ASTSource(kernel, types, constexprs=constants), target=TARGET).metadata.shared


def main(dtype: str) -> None:
    """Print the shared memory of the kernels of one dtype, for all head dimensions."""
    states = dict.fromkeys(("query", "keys", "values", "tail_keys", "tail_values", "bias", "out"), f"*{dtype}")
    float32 = dict.fromkeys(("partial", "lse"), "*fp32")
    for dim in (64, 80, 128, 256):
        wide = kernels._wide(dim)
        shape = kernels.tile_shape(100, wide, 4 if dtype == "fp32" else 2)
        tile = dict(zip(("TILE", "ENTRIES"), shape, strict=True))
        widths = {"ROWS": 100, "VALUE_DIM": dim, "VALUE_WIDE": wide}
        flags = {"KV_HEADS": 4, "DIM": dim, "WIDE": wide, "BIASED": True, "IN_FLOAT32": False}
        pointers = {**states, **float32, "bias": "*fp32", "starts": "*i64", "counts": "*i64", "scale": "fp32"}
        pointers.pop("out")
        print(shared_bytes(kernels._attend_chunk, {**tile, **widths, **flags}, pointers))
        print(shared_bytes(kernels._merge, {**widths, "Q_HEADS": 100}, {**float32, "out": states["out"]}))


if __name__ == "__main__":
    main(sys.argv[1])
