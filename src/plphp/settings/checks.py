# SPDX-License-Identifier: Apache-2.0
"""Checks of the values of settings; each raises `ConfigError` with the setting, its value and what was expected."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError

from .ladder import WHOLE, Ladder

KEPT_BY = ("target_retention", "retention_rate", "attentive_threshold", "indifferent_threshold")
"""Settings that say how much is kept where no ladder does."""


def check_fraction(name: str, value: object) -> None:
    """Raise unless a value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number between 0 and 1, got {value!r}.")
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value}.")


def check_int(name: str, value: object, *, minimum: int, or_else: str = "") -> None:
    """Raise unless a value is an integer of at least ``minimum``; ``or_else`` is for the message alone."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        choices = f"an integer of at least {minimum}" + (f" or {or_else}" if or_else else "")
        raise ConfigError(f"{name} must be {choices}, got {value!r}.")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless a value is among the choices."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def layer_numbers(values: object) -> tuple[int, ...]:
    """The numbers of ``exempt_layers``."""
    if isinstance(values, (list, tuple)) and all(type(v) is int for v in values):
        return tuple(values)
    raise ConfigError(f"exempt_layers must be a list of layer numbers, got {values!r}.")


def check_classes(attentive: float, indifferent: float, quantile: float) -> None:
    """Raise unless layers can be sorted into classes by these thresholds and by this quantile."""
    for name, value in (("attentive_threshold", attentive), ("indifferent_threshold", indifferent)):
        check_fraction(name, value)
    check_fraction("class_quantile", quantile)
    if not 0 < quantile <= 0.5:
        raise ConfigError(f"class_quantile must be in (0, 0.5], got {quantile}.")
    if indifferent > attentive:
        raise ConfigError(
            f"indifferent_threshold ({indifferent}) must not be above attentive_threshold ({attentive}): swap them, or "
            "move one."
        )


def check_room(which: str, base: float, delta: float) -> None:
    """Raise unless the rates of all classes are in [0, 1].

    Parameters
    ----------
    which : str
        Name of the setting that the base rate is from.
    base, delta : float
        Retention rate of a balanced layer, and by how much those of the other classes differ.
    """
    if base - delta < -1e-9 or base + delta > 1 + 1e-9:
        raise ConfigError(
            f"{which} - retention_delta and {which} + retention_delta must stay in [0, 1], got "
            f"{base} -/+ {delta}: use a retention_delta of at most {min(base, 1 - base):g}."
        )


def check_tiers(tiers: object, read: object, rest: object, books: object, budget: object = None) -> None:
    """Raise unless the settings of tiers are valid, each by itself and together.

    Parameters
    ----------
    tiers, read, rest, books, budget
        See `plphp.PLPHPConfig`; under a budget entries come to few bits without tiers.
    """
    if tiers is not None and not isinstance(tiers, str):
        raise ConfigError(f"tiers must be a ladder as text, such as 't10' or 'pr2=.20,rvq=.24,pq=.32', got {tiers!r}.")
    if isinstance(read, bool) or not isinstance(read, (int, float)) or not 0 < read <= 1:
        raise ConfigError(f"read must be a number above 0 and at most 1, got {read!r}.")
    if not isinstance(rest, bool):
        raise ConfigError(f"rest must be true or false, got {rest!r}.")
    if books is not None and (not isinstance(books, str) or not books):
        raise ConfigError(f"books must name the file of a query bank, or be 'bundled', got {books!r}.")
    without = {"read": (read, read == 1), "rest": (rest, rest), "books": (books, books is None)}
    if budget is not None:
        del without["books"]
    changed = {name: value for name, (value, default) in without.items() if not default}
    for name, value in changed.items():
        if tiers is None:
            raise ConfigError(
                f"{name}={value} is for entries in few bits: name a ladder, as in tiers=t10, or leave it out."
            )
        if set(Ladder.parse(tiers).names) == {WHOLE}:
            raise ConfigError(f"{name}={value} is for entries in few bits, and tiers={tiers} has none: leave it out.")
    if not rest and read == 1:
        raise ConfigError(
            "rest=False is for entries that a step does not read, and it reads all: give read, as in read=0.2."
        )


def check_kept_once(ladder: str, given: Mapping[str, Any]) -> None:
    """Raise where a setting beside the ladder says how much is kept.

    Parameters
    ----------
    ladder : str
        The ladder, in words to begin a sentence with.
    given : mapping of str to object
        The settings that a user has given, None for what is left open; those of `KEPT_BY` count.
    """
    for name in KEPT_BY:
        if given.get(name) is not None:
            raise ConfigError(
                f"{ladder} says how much is kept, and so does {name}={given[name]}: leave {name} out, and choose "
                "another ladder or other shares to keep more or less."
            )


def check_rates(tiers: str | None, given: Mapping[str, Any]) -> None:
    """Raise where two settings of a config say how much is kept.

    Parameters
    ----------
    tiers : str, optional
        The ladder that the config names.
    given : mapping of str to object
        The settings that a user has given, None for what is left open; those of `KEPT_BY` count.
    """
    if tiers is not None:
        check_kept_once(f"tiers={tiers}", given)
    rate, target = given.get("retention_rate"), given.get("target_retention")
    if rate is not None and target is not None:
        raise ConfigError(
            f"retention_rate={rate} and target_retention={target} both say how much is kept: leave one of them out."
        )


def table_of(path: str | Path, beside: Collection[str]) -> dict[str, Any]:
    """Read the settings of a TOML file: its table ``[plphp]`` if there is one, else the top level.

    Parameters
    ----------
    path : str or Path
        The file.
    beside : collection of str
        Names that may not stand beside the table.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not TOML, or has settings beside the table.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"Cannot read the config file {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a valid TOML file: {error}.") from error
    table = values.get("plphp", values)
    outside = [] if table is values else sorted({*beside} & values.keys())
    if outside:
        raise ConfigError(
            f"{', '.join(outside)} in {path} stands beside the table [plphp], which holds the settings: move it "
            "there, as in [[plphp.earlier]]."
        )
    if not isinstance(table, dict):
        raise ConfigError(f"[plphp] in {path} must be a table of settings, got {table!r}.")
    return table
