# SPDX-License-Identifier: Apache-2.0
"""The one grammar in which settings are written on a line: for `PLPHPConfig.parse`, ``plphp eval`` and the server.

::

    list      = line {"," line}                            plphp eval --methods
    line      = [label "="] chain ["@" rate {"+" rate}]    a line of a table
    chain     = part {"+" part}                            PLPHPConfig.parse, --config
    part      = method [":" key "=" value {"," key "=" value}]
    value     = word | '"' text '"'                        in quotes: text as it is, with any of , @ + : = in it

A chain names methods in the order in which a prompt passes their stages, each with settings of its own, as in
``fastv:retention_rate=0.5+query_bank:bank=bundled,retention_rate=0.2``; ``keep`` is short for ``retention_rate``. A
``+`` begins a part where a whole name follows it, with nothing or one of ``: + @ ,`` behind: ``exempt_layers=0+1`` and
``bank=my+bank.safetensors`` are values. A value that holds a comma, an ``@``, or a ``+`` before a bare name stands in
double quotes, as in ``query_bank:bank=bundled,tiers="pr2=.20,rvq=.24,pq=.32"``; a value that holds a double quote is
for a TOML file or `PLPHPConfig.from_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from plphp.errors import ConfigError

from .ladder import quoting_hint

_NEXT_PART = re.compile(r"\+(?=\s*[A-Za-z_][\w-]*\s*(?:[:+@,]|$))")
_COMMA = re.compile(",")
_QUOTED = re.compile(r'"[^"]*"')
_SWITCHES = ("rest",)
"""Settings that are true or false."""
_SHORT = {"keep": "retention_rate"}
"""Settings that a line may name in short."""


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

    Raises
    ------
    ConfigError
        If a double quote has no partner.
    """
    lines: list[str] = []
    for text in texts:
        in_settings = False
        for piece in _pieces(text):
            first, *later = _cut(piece, _NEXT_PART)
            _, equals, value = first.partition("=")
            if in_settings and equals and ":" not in _unquoted(first) and value.strip() not in methods:
                lines[-1] += f",{piece}"
            else:
                lines.append(piece)
                in_settings = ":" in first
            if later:  # of a chain the settings behind a comma are those of its last method
                in_settings = ":" in later[-1]
            if "@" in _unquoted(piece):  # rates end a line
                in_settings = False
    return lines


def read_line(text: str) -> Line:
    """Take a line apart.

    Raises
    ------
    ConfigError
        If nothing stands before or behind the ``=`` of a label, or a double quote has no partner.
    """
    end = _unquoted(text).find("@")
    spec, rates = (text, None) if end < 0 else (text[:end], tuple(text[end + 1 :].split("+")))
    label, chain = _label(spec.strip())
    return Line(label, chain, rates)


def read_chain(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Take a chain apart.

    Returns
    -------
    list of (str, dict)
        The methods with their settings, the values as numbers, text, tuples, truth values or None.

    Raises
    ------
    ConfigError
        If a setting is no ``key=value``, one is given twice, or double quotes do not stand around a whole value.
    """
    parts = _cut(text.strip(), _NEXT_PART)
    if (len(parts) > 1 and not all(parts)) or any(part.rstrip().endswith("+") for part in parts):
        raise ConfigError(f"Expected a method on both sides of each + in {text!r}.")
    return [_read_part(part, text) for part in parts]


def keys_of(text: str) -> set[str]:
    """The settings that the last part of a chain names."""
    return set(read_chain(text)[-1][1])


def _read_part(part: str, text: str) -> tuple[str, dict[str, Any]]:
    method, _, rest = part.partition(":")
    values: dict[str, Any] = {}
    for piece in _pieces(rest):
        key, equals, value = piece.partition("=")
        if not equals:
            where = f"{piece!r} in {text!r}.{quoting_hint(piece)}"
            raise ConfigError(f"Expected key=value after {method.strip()!r}:, got {where}")
        name = _SHORT.get(key.strip(), key.strip())
        if name in values or name == "method":
            raise ConfigError(f"{name!r} is given twice in {text!r}.")
        values[name] = _read_value(name, value.strip())
    return method.strip(), values


def _read_value(key: str, value: str) -> Any:
    """Turn the text of a setting into a number, a tuple, a truth value or None; words and what is quoted stay text."""
    if _QUOTED.fullmatch(value):
        return value[1:-1]
    if '"' in key + value:
        raise ConfigError(f'Double quotes stand around a whole value, as in tiers="pr2=.2,pq", got {key}={value}.')
    if key == "exempt_layers":
        return tuple(_number(part) for part in value.split("+") if part)
    if key in _SWITCHES and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return None if value.lower() == "none" else _number(value)


def _unquoted(text: str) -> str:
    """The text with every quoted value blanked out by quotes, so that places in it are places in the text.

    Raises
    ------
    ConfigError
        If a double quote has no partner.
    """
    blank = _QUOTED.sub(lambda match: '"' * len(match.group()), text)
    if text.count('"') % 2:
        raise ConfigError(
            f'A double quote has no partner in {text!r}: write key="value", and quote for the shell, too.'
        )
    return blank


def _cut(text: str, separator: re.Pattern[str]) -> list[str]:
    """Cut a text at a separator where it stands outside quotes."""
    ends = [match.span() for match in separator.finditer(_unquoted(text))]
    starts = [0, *(end for _, end in ends)]
    return [text[start:end] for start, end in zip(starts, [*(start for start, _ in ends), len(text)], strict=True)]


def _pieces(text: str) -> list[str]:
    """What stands between the commas outside quotes, and is not empty."""
    return [piece.strip() for piece in _cut(text, _COMMA) if piece.strip()]


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
