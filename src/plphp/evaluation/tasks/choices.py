# SPDX-License-Identifier: Apache-2.0
"""The splits of the built-in tasks, and the check of a setting that is one of a few words."""

from collections.abc import Sequence
from typing import Literal, get_args

from plphp.errors import ConfigError

Split = Literal["dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that a setting cannot have.

    Raises
    ------
    ConfigError
        If ``value`` is not in ``known``.
    """
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
