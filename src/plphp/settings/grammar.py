# SPDX-License-Identifier: Apache-2.0
"""The one grammar in which settings are written on a line: for `PLPHPConfig.parse`, ``plphp eval`` and the server.

::

    list      = line {"," line}                            plphp eval --methods
    line      = [label "="] chain ["@" rate {"+" rate}]    a line of a table
    chain     = part {"+" part}                            PLPHPConfig.parse, --config
    part      = method [":" key "=" value {"," key "=" value}]

A chain names methods in the order in which a prompt passes their stages, each with settings of its own, as in
``fastv:retention_rate=0.5+query_bank:bank=bundled,retention_rate=0.2``. A ``+`` begins a part where a whole name
follows it, with nothing or one of ``: + @ ,`` behind: ``exempt_layers=0+1`` and ``bank=my+bank.safetensors`` are
values. A value that holds a comma, an ``@``, or a ``+`` before a bare name is for a TOML file or
`PLPHPConfig.from_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from plphp.errors import ConfigError

_NEXT_PART = re.compile(r"\+(?=\s*[A-Za-z_][\w-]*\s*(?:[:+@,]|$))")


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Parameters
    ----------
    label : str
        Its name: what stands before the first ``=`` of a label, else the chain as it is written.
    chain : str
        Methods with their settings.
    rates : tuple of str, optional
        What follows the ``@``; None where there is none.
    """

    label: str
    chain: str
    rates: tuple[str, ...] | None


def split_lines(texts: Iterable[str], methods: Collection[str]) -> list[str]:
    """Cut a list apart; a comma before another setting of the same method ends no line.

    Parameters
    ----------
    texts : iterable of str
        Lines by commas.
    methods : collection of str
        Names of the methods, by which a label is told from a setting.

    Examples
    --------
    >>> split_lines(["plphp:query_rows=text,seed=1,uniform", "best=random"], ["plphp", "uniform", "random"])
    ['plphp:query_rows=text,seed=1', 'uniform', 'best=random']
    """
    lines: list[str] = []
    for text in texts:
        in_settings = False
        for piece in filter(None, (piece.strip() for piece in text.split(","))):
            first, *later = _NEXT_PART.split(piece)
            _, equals, value = first.partition("=")
            if in_settings and equals and ":" not in first and value.strip() not in methods:
                lines[-1] += f",{piece}"
            else:
                lines.append(piece)
                in_settings = ":" in first
            if later:  # of a chain the settings behind a comma are those of its last method
                in_settings = ":" in later[-1]
    return lines


def read_line(text: str) -> Line:
    """Take a line apart.

    Raises
    ------
    ConfigError
        If nothing stands before or behind the ``=`` of a label.
    """
    spec, at, rates = text.partition("@")
    label, chain = _label(spec.strip())
    return Line(label, chain, tuple(rates.split("+")) if at else None)


def read_chain(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Take a chain apart.

    Returns
    -------
    list of (str, dict)
        The methods with their settings, the values as numbers, text, tuples or None.

    Raises
    ------
    ConfigError
        If a setting is no ``key=value``, or one is given twice.
    """
    parts = _NEXT_PART.split(text.strip())
    if (len(parts) > 1 and not all(parts)) or any(part.rstrip().endswith("+") for part in parts):
        raise ConfigError(f"Expected a method on both sides of each + in {text!r}.")
    return [_read_part(part, text) for part in parts]


def keys_of(text: str) -> set[str]:
    """The settings that the last part of a chain names."""
    return set(read_chain(text)[-1][1])


def _read_part(part: str, text: str) -> tuple[str, dict[str, Any]]:
    method, _, rest = part.partition(":")
    values: dict[str, Any] = {}
    for piece in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = piece.partition("=")
        if not equals:
            raise ConfigError(f"Expected key=value after {method.strip()!r}:, got {piece!r} in {text!r}.")
        if key.strip() in values or key.strip() == "method":
            raise ConfigError(f"{key.strip()!r} is given twice in {text!r}.")
        values[key.strip()] = _read_value(key.strip(), value.strip())
    return method.strip(), values


def _read_value(key: str, value: str) -> Any:
    """Turn the text of a setting into a number, a tuple or None; words stay text."""
    if key == "exempt_layers":
        return tuple(_number(part) for part in value.split("+") if part)
    return None if value.lower() == "none" else _number(value)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _label(text: str) -> tuple[str, str]:
    """Label and chain of ``"label=method:..."``; without a label the text is its own."""
    before, equals, after = text.partition("=")
    if equals and ":" not in before:
        if not before.strip() or not after.strip():
            raise ConfigError(f"Expected label=method, got {text!r}.")
        return before.strip(), after.strip()
    return text, text
