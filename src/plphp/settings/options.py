# SPDX-License-Identifier: Apache-2.0
"""Options of a single method: what it declares, and what a config gives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from plphp.errors import ConfigError, did_you_mean

from .ladder import quoting_hint

Value = int | float | str | None


@dataclass(frozen=True)
class Option:
    """An option that a method declares.

    Parameters
    ----------
    default : int, float, str or None
        Its type is the type of the option; None is a float that may be left open.
    low, high : float, optional
        Range of a number, both ends included.
    choices : tuple of str
        What a text may be; anything if empty.
    odd : bool
        Whether an integer has to be odd.
    sets_rate : bool
        Whether a value says how much is kept, in the place of a rate.
    """

    default: Value
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    odd: bool = False
    sets_rate: bool = False

    def accepts(self, value: object) -> bool:
        """Whether the option can have a value."""
        if value is None or isinstance(self.default, str):
            is_choice = isinstance(value, str) and (value in self.choices or not self.choices)
            return is_choice if value is not None else self.default is None
        kinds = int if isinstance(self.default, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            return False
        in_range = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        return in_range and not (self.odd and value % 2 == 0)

    def __str__(self) -> str:
        if isinstance(self.default, str):
            return f"one of {', '.join(map(repr, self.choices))}" if self.choices else "text"
        kind = "an odd integer" if self.odd else "an integer" if isinstance(self.default, int) else "a number"
        if self.low is not None and self.high is not None:
            kind += f" from {self.low:g} to {self.high:g}"
        elif self.low is not None:
            kind += f" of at least {self.low:g}"
        return kind + (" or None" if self.default is None else "")


class Options(Mapping[str, Value]):
    """An immutable mapping of option names to values, with a hash."""

    def __init__(self, values: object) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise ConfigError(f"options must be a mapping of option names to values, got {values!r}.")
        for name, value in values.items():
            if not isinstance(value, int | float | str | None):
                raise ConfigError(f"The option {name!r} must be a number or text, got {value!r}.")
        self._values: dict[str, Value] = {name: values[name] for name in sorted(values)}

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


def check_options(
    method: str, declared: Mapping[str, Option], values: Mapping[str, Value], settings: Iterable[str] = ()
) -> None:
    """Compare the options of a config with those that its method declares.

    Parameters
    ----------
    method : str
        Name of the method.
    declared : mapping of str to Option
        The options of the method.
    values : mapping of str to int, float, str or None
        The options of the config.
    settings : iterable of str
        Names of the settings that every method has: what a misspelled name may have meant, too.

    Raises
    ------
    ConfigError
        If an option is unknown or has a value that it cannot have.
    """
    for name, value in values.items():
        if name not in declared:
            hint = quoting_hint(name) or did_you_mean(name, {*declared, *settings})
            raise ConfigError(f"Unknown setting {name!r}, which is no option of the method {method!r} either.{hint}")
        if not declared[name].accepts(value):
            raise ConfigError(f"The option {name!r} of the method {method!r} must be {declared[name]}, got {value!r}.")


def settings(declared: Mapping[str, Option], values: Mapping[str, Value]) -> dict[str, Any]:
    """All options of a method by name: those of a config, else the defaults."""
    return {name: values.get(name, option.default) for name, option in declared.items()}
