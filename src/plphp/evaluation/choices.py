# SPDX-License-Identifier: Apache-2.0
"""What settings of an evaluation may be; the command line shows it without importing torch."""

from collections.abc import Sequence
from typing import Literal, get_args

from plphp.errors import ConfigError

Split = Literal["dev", "test"]
Mode = Literal["auto", "verify", "decode", "generate", "label-free"]
SPLITS: tuple[Split, ...] = get_args(Split)
MODES: tuple[Mode, ...] = get_args(Mode)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ConfigError unless a setting is one of those that it may be."""
    if value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
