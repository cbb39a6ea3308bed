# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for compute capability 8.0 and print the shared memory of each: a process of its own,
as Triton either interprets or compiles."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plphp.kernels import _compact_triton, _decode_triton, _scores_triton
from plphp.kernels._triton_shapes import tile_shape, wide_of

TARGET = GPUTarget("cuda", 80, 32)


def shared_bytes(kernel: triton.JITFunction, constants: dict[str, int], pointers: dict[str, str]) -> int:
    """Compile a kernel whose arguments are integers, but for the constants and those of the pointers that it has.

    Strides over a head's dimension are compiled as the constant 1 that they are, as at run time.
    """
    constants = {**{name: 1 for name in kernel.arg_names if name.endswith("_dim")}, **constants}
    own = {name: pointer for name, pointer in pointers.items() if name in kernel.arg_names}
    types = {**dict.fromkeys(kernel.arg_names, "i32"), **own, **dict.fromkeys(constants, "constexpr")}
    return triton.compile(ASTSource(kernel, types, constexprs=constants), target=TARGET).metadata.shared


def main(dtype: str, of_values: str) -> None:
    """Print the shared memory of the kernels of one dtype, or of one for keys and one for values, for all head
    dimensions."""
    states = dict.fromkeys(("query", "keys", "tail_keys"), f"*{dtype}")
    states |= dict.fromkeys(("values", "tail_values"), f"*{of_values}")
    float32 = dict.fromkeys(("partial", "lse"), "*fp32")
    index = dict.fromkeys(("starts", "counts", "position", "counted"), "*i64")
    flags = dict.fromkeys(("valid", "keep"), "*i1")
    for dim in (64, 80, 128, 256):
        wide = wide_of(dim)
        tile = dict(zip(("TILE", "ENTRIES"), tile_shape(100, wide, 4 if dtype == "fp32" else 2), strict=True))
        widths = {"VALUE_DIM": dim, "VALUE_WIDE": wide}
        heads = {"KV_HEADS": 4, "DIM": dim, "WIDE": wide}
        reading = {**tile, **heads, "IN_FLOAT32": False}
        scale = {**states, **index, **flags, "scale": "fp32"}
        print(shared_bytes(_decode_triton._attend_chunk, {**reading, **widths, "ROWS": 100, "BIASED": True},
                           {**scale, **float32, "bias": "*fp32"}))  # fmt: skip
        print(shared_bytes(_decode_triton._merge, {**widths, "ROWS": 100, "Q_HEADS": 100},
                           {**float32, "out": f"*{dtype}"}))  # fmt: skip
        print(shared_bytes(_scores_triton._window_lse, {**reading, "ROWS": 100},
                           {**scale, "old": f"*{dtype}", "parts": "*fp32"}))  # fmt: skip
        print(shared_bytes(_scores_triton._window_mass, {**reading, "GROUP": 7},
                           {**scale, **dict.fromkeys(("weight", "lse", "mass"), "*fp32")}))  # fmt: skip
        new = {"new_keys": f"*{dtype}", "new_values": f"*{of_values}"}
        print(shared_bytes(_compact_triton._gather, {"ENTRIES": tile["ENTRIES"], **heads, **widths},
                           {**states, **index, **flags, **new}))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[-1])
