# SPDX-License-Identifier: Apache-2.0
"""Memory, bandwidth and peak arithmetic of accelerators, by name or from figures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from plphp.errors import ConfigError, did_you_mean

_DATA_SHEETS: dict[str, tuple[float, float, float | None]] = {
    # name: memory in GB, bandwidth in GB/s, TFLOP/s of dense bf16 matrix products with sums in fp32. Data sheets that
    # give figures with 2:4 sparsity alone are halved. None: no such units (T4, V100), or no figure of the maker (A10G).
    "A10": (24, 600, 125),  # NVIDIA A10 data sheet
    "A100": (80, 2039, 312),  # NVIDIA A100 data sheet
    "A100-40GB": (40, 1555, 312),
    "A10G": (24, 600, None),
    "B200": (180, 8000, 2250),  # NVIDIA Blackwell data sheet, HGX B200, per GPU
    "H100": (80, 3350, 989.5),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    "H100-NVL": (94, 3900, 835.5),  # the same, NVL: 1,671 with sparsity
    "H100-PCIe": (80, 2000, 756.5),  # NVIDIA H100 PCIe product brief: 1,513 with sparsity
    "H200": (141, 4800, 989.5),  # NVIDIA H200 data sheet, SXM: 1,979 with sparsity
    "L4": (24, 300, 121),  # NVIDIA L4 data sheet: 242 with sparsity
    "L40S": (48, 864, 362),  # NVIDIA L40S data sheet
    "MI300X": (192, 5300, 1307.4),  # AMD Instinct MI300X data sheet
    "RTX-3090": (24, 936, 71),  # NVIDIA Ampere GA102 whitepaper
    "RTX-4090": (24, 1008, 165.2),  # NVIDIA Ada whitepaper
    "RTX-5090": (32, 1792, 209.5),  # NVIDIA RTX Blackwell whitepaper
    "T4": (16, 320, None),
    "V100": (32, 900, None),
}
_UNITS = {"GB": 1e9, "GIB": 2.0**30, "TB": 1e12, "MB": 1e6}
_FIGURES = re.compile(
    r"([\d.]+) *(GB|GiB|TB|MB) *, *([\d.]+) *(GB|GiB|TB|MB) */ *s(?: *, *([\d.]+) *TFLOPS?(?: */ *s)?)?", re.IGNORECASE
)


@dataclass(frozen=True)
class Accelerator:
    """An accelerator, or a machine.

    Parameters
    ----------
    name : str
        Name, or the text with its figures.
    memory : float
        Size of the memory in bytes.
    bandwidth : float
        Bytes per second at which memory can be read; by name, the peak of the data sheet, which no program reaches.
    flops : float, optional
        Floating-point operations per second of matrix products; by name, the peak of the data sheet for dense bf16,
        which no program reaches. None where that is not known.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float | None = None


ACCELERATORS = {
    name: Accelerator(name, memory * 1e9, bandwidth * 1e9, None if peak is None else peak * 1e12)
    for name, (memory, bandwidth, peak) in _DATA_SHEETS.items()
}
"""Known accelerators by name, with the figures of their makers' data sheets."""


def accelerator(text: str) -> Accelerator:
    """Return an accelerator by its name, or from its memory, its bandwidth and, where it is known, its peak arithmetic.

    Parameters
    ----------
    text : str
        A key of `ACCELERATORS`, in any case, or figures such as ``"24GB,1008GB/s"`` or ``"24GB,1008GB/s,165TFLOP/s"``.

    Raises
    ------
    ConfigError
        If the text is neither.

    Examples
    --------
    >>> accelerator("h200").bandwidth
    4800000000000.0
    >>> accelerator("24GB,1008GB/s")
    Accelerator(name='24GB,1008GB/s', memory=24000000000.0, bandwidth=1008000000000.0, flops=None)
    """
    by_key = {_key(name): known for name, known in ACCELERATORS.items()}
    if _key(text) in by_key:
        return by_key[_key(text)]
    figures = _FIGURES.fullmatch(text.strip())
    if figures is None:
        raise ConfigError(
            f"Unknown GPU {text!r}.{did_you_mean(text, ACCELERATORS)} Give one of {', '.join(ACCELERATORS)}, or memory "
            "and bandwidth, such as '24GB,1008GB/s', with the peak if you like: '24GB,1008GB/s,165TFLOP/s'."
        )
    memory, bandwidth = (_bytes(figures[group], figures[group + 1], text) for group in (1, 3))
    flops = None if figures[5] is None else _positive(figures[5], 1e12, text)
    return Accelerator(text.strip(), memory, bandwidth, flops)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).upper()


def _bytes(number: str, unit: str, text: str) -> float:
    return _positive(number, _UNITS[unit.upper()], text)


def _positive(number: str, unit: float, text: str) -> float:
    try:
        value = float(number) * unit
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"Memory, bandwidth and peak must be positive numbers, got {text!r}.")
    return value
