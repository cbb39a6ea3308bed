# SPDX-License-Identifier: Apache-2.0
"""Memory and bandwidth of accelerators, by name or as given."""

from __future__ import annotations

import re
from dataclasses import dataclass

from plphp.errors import ConfigError, did_you_mean

_DATA_SHEETS = {
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
_GIVEN = re.compile(r"([\d.]+) *(GB|GiB|TB|MB) *, *([\d.]+) *(GB|GiB|TB|MB) */ *s", re.IGNORECASE)


@dataclass(frozen=True)
class Accelerator:
    """An accelerator, or a machine.

    Parameters
    ----------
    name : str
        As it was named.
    memory : float
        Bytes.
    bandwidth : float
        Bytes per second that memory can be read at; of a name, the peak in its data sheet, which no program reaches.
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
        A key of `ACCELERATORS`, in any case, or such as ``"24GB,1008GB/s"``.

    Raises
    ------
    ConfigError
        If it is neither.

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
    given = _GIVEN.fullmatch(text.strip())
    if given is None:
        raise ConfigError(
            f"Unknown GPU {text!r}.{did_you_mean(text, ACCELERATORS)} Give one of {', '.join(ACCELERATORS)}, or memory "
            "and bandwidth, such as '24GB,1008GB/s'."
        )
    memory, bandwidth = (_bytes(given[place], given[place + 1], text) for place in (1, 3))
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
