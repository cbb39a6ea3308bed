# SPDX-License-Identifier: Apache-2.0
"""Numbers of bytes as people write them."""

from __future__ import annotations

import re

from plphp.errors import ConfigError
from plphp.io.quoting import quoted

UNITS = {"": 1, "B": 1, **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}}
UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)}
"""By unit in capitals, its bytes."""

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def bytes_in(text: str) -> int | None:
    """The bytes that a text says, with or without a unit; None where it says none, or less than one.

    Examples
    --------
    >>> bytes_in("1.5 KiB"), bytes_in("200MB"), bytes_in("200 images")
    (1536, 200000000, None)
    """
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].upper() not in UNITS:
        return None
    return int(float(match[1]) * UNITS[match[2].upper()]) or None


def byte_count(text: str, name: str) -> int:
    """Read a number of bytes such as ``"200MB"``, ``"1.5GiB"`` or ``"1000000"``.

    Parameters
    ----------
    text : str
        The number, with or without a unit.
    name : str
        What it is of, for the message.

    Raises
    ------
    ConfigError
        If it is none, or below one byte.
    """
    count = bytes_in(text)
    if count is None:
        raise ConfigError(f"{name} must be a number of bytes such as '200MB' or '1.5GiB', got {quoted(text)}.")
    return count
