# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for compute capability 8.0 and print the shared memory of each: a process of its own,
as Triton either interprets or compiles."""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plphp.kernels import _choose_triton, _compact_triton, _decode_triton, _scores_triton, _tier_triton
from plphp.kernels._triton_shapes import tile_shape, wide_of

TARGET = GPUTarget("cuda", 80, 32)
NAMES = ("BOOKS", "PART", "PLANES", "KIND", "GROUP", "CENTRED")
SIDES = {
    "pr2": (1, 8, 2, 1, 0, 1),
    "rvq": (2, 8, 0, 0, 0, 1),
    "c4": (0, 8, 4, 2, 1024, 0),
    "kivi4": (0, 8, 4, 3, 32, 0),
}
"""Keys or values of rungs that take all branches: the constants of `plphp.kernels._coded_triton._Side`."""


def shared_bytes(kernel: triton.JITFunction, constants: dict[str, int], pointers: dict[str, Any]) -> int:
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
    float32 = dict.fromkeys(("partial", "lse", "out_lse"), "*fp32")
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


def coded(dtype: str, dim: int = 128) -> None:
    """Print the shared memory of the kernels of coded entries."""
    wide = wide_of(dim)
    tile = dict(zip(("TILE", "ENTRIES"), tile_shape(7, wide, 4 if dtype == "fp32" else 2), strict=True))
    queries = dict.fromkeys(("query", "out", "rows"), f"*{dtype}")
    indices = dict.fromkeys(("table", "chosen", "ends"), "*i32")
    wide_floats = ("turned", "partial", "lse", "logits", "mass", "rest_lse", "rotation", "out_lse")
    numbers = dict.fromkeys(("scale", "factor", "shift", "key_shift", "value_shift"), "fp32")
    types = {**queries, **indices, **dict.fromkeys(wide_floats, "*fp32"), **numbers, "rest_values": "*fp16"}
    reading = {"KV_HEADS": 4, "ROWS": 7, "DIM": dim, "WIDE": wide, "IN_FLOAT32": False, **tile}
    values = {"HALVES": 2, "VALUE_DIM": dim, "VALUE_WIDE": wide}

    def side(rung: str, prefix: str = "") -> tuple[dict[str, int], dict[str, Any]]:
        """Constants, and types of pointers."""
        constants = dict(zip((prefix.upper() + name for name in NAMES), SIDES[rung], strict=True))
        streams, books = SIDES[rung][0] + SIDES[rung][2], max(1, SIDES[rung][0])
        pointers = (("*u8",) * streams, "*fp16", ("*fp16",) * books, "*fp16")
        names = (prefix + name for name in ("streams", "steps", "books", "means"))
        return constants, dict(zip(names, pointers, strict=True))

    for keys, own, recalls in (("pr2", "pr2", True), ("rvq", "rvq", False), ("c4", "kivi4", False)):
        (of_keys, key_types), (of_values, value_types) = side(keys, "key_"), side(own, "value_")
        print(shared_bytes(_tier_triton.attend_tier, {**reading, **values, **of_keys, **of_values, "RECALLS": recalls},
                           {**types, **key_types, **value_types}))  # fmt: skip
    of_index, index_types = side("c4")
    print(shared_bytes(_tier_triton.index_logits, {**reading, **of_index}, {**types, **index_types}))
    print(shared_bytes(_choose_triton.choose, {"GROUP": 7, "RESTS": True, "BLOCK": 4096}, types))
    print(shared_bytes(_tier_triton.turn, {"DIM": dim, "WIDE": wide}, {**types, "out": "*fp32"}))
    print(shared_bytes(_tier_triton.merge_tiers, {**values, "RESTS": True, "ROWS": 7}, types))


if __name__ == "__main__":
    if sys.argv[1] == "coded":
        coded(sys.argv[2])
    else:
        main(sys.argv[1], sys.argv[-1])
