# SPDX-License-Identifier: Apache-2.0
"""Quantities in words."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Return a number of bytes with a binary unit.

    Examples
    --------
    >>> human_bytes(512), human_bytes(1536), human_bytes(3 * 2**30)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
