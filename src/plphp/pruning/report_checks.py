# SPDX-License-Identifier: Apache-2.0
"""Checks of the values of a report that was read from a file."""

from __future__ import annotations

from typing import Any


def check_numbers(report: object, names: tuple[str, ...]) -> None:
    """Raise TypeError where a field of a report that was read is no number."""
    for name in names:
        value = getattr(report, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")


def integers(values: Any, name: str) -> list[int]:
    """The values; raises TypeError where they are no list of integers."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"{name} must be a list of integers, got {values!r:.60}")
    return values
