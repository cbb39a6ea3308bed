# SPDX-License-Identifier: Apache-2.0
"""Memory and bandwidth of accelerators, by name or from figures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from plphp.errors import ConfigError, did_you_mean

_DATA_SHEETS = {
    # name: memory in GB, bandwidth in GB/s
    "A10": (24, 600),
    "A100": (80, 2039),
    "A100-40GB": (40, 1555),
    "A10G": (24, 600),
    "B200": (180, 8000),
    "H100": (80, 3350),
    "H100-NVL": (94, 3900),
    "H100-PCIe": (80, 2000),
    "H200": (141, 4800),
    "L4": (24, 300),
    "L40S": (48, 864),
    "MI300X": (192, 5300),
    "RTX-3090": (24, 936),
    "RTX-4090": (24, 1008),
    "RTX-5090": (32, 1792),
    "T4": (16, 320),
    "V100": (32, 900),
}
_UNITS = {"GB": 1e9, "GIB": 2.0**30, "TB": 1e12, "MB": 1e6}
_FIGURES = re.compile(r"([\d.]+) *(GB|GiB|TB|MB) *, *([\d.]+) *(GB|GiB|TB|MB) */ *s", re.IGNORECASE)


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
    """

    name: str
    memory: float
    bandwidth: float


ACCELERATORS = {
    name: Accelerator(name, memory * 1e9, bandwidth * 1e9) for name, (memory, bandwidth) in _DATA_SHEETS.items()
}
"""Known accelerators by name, with the figures of their makers' data sheets."""


def accelerator(text: str) -> Accelerator:
    """Return an accelerator by its name, or from its memory and bandwidth.

    Parameters
    ----------
    text : str
        A key of `ACCELERATORS`, in any case, or figures such as ``"24GB,1008GB/s"``.

    Raises
    ------
    ConfigError
        If the text is neither.

    Examples
    --------
    >>> accelerator("h200").bandwidth
    4800000000000.0
    >>> accelerator("24GB,1008GB/s")
    Accelerator(name='24GB,1008GB/s', memory=24000000000.0, bandwidth=1008000000000.0)
    """
    by_key = {_key(name): known for name, known in ACCELERATORS.items()}
    if _key(text) in by_key:
        return by_key[_key(text)]
    figures = _FIGURES.fullmatch(text.strip())
    if figures is None:
        raise ConfigError(
            f"Unknown GPU {text!r}.{did_you_mean(text, ACCELERATORS)} Give one of {', '.join(ACCELERATORS)}, or memory "
            "and bandwidth, such as '24GB,1008GB/s'."
        )
    memory, bandwidth = (_bytes(figures[group], figures[group + 1], text) for group in (1, 3))
    return Accelerator(text.strip(), memory, bandwidth)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).upper()


def _bytes(number: str, unit: str, text: str) -> float:
    try:
        value = float(number) * _UNITS[unit.upper()]
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"Memory and bandwidth must be positive numbers, got {text!r}.")
    return value
