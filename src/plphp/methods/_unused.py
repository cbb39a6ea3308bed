# SPDX-License-Identifier: Apache-2.0
"""Settings of layers, heads and queries that a whole stage has no use for are refused, and not left undone in silence.

Thresholds and rates of classes of layers are not among them: methods without classes go by their own rate."""

from __future__ import annotations

from collections.abc import Iterable

from plphp.errors import ConfigError
from plphp.settings.config import PLPHPConfig

OF_HEADS = ("heads", "head_safeguard")
"""Settings of the KV heads, each of which only methods of the KV cache let keep its own tokens."""


def refuse_unused(config: PLPHPConfig, names: Iterable[str], reason: str) -> None:
    """Raise `ConfigError` for a setting that is not at its default.

    Parameters
    ----------
    config : PLPHPConfig
        Settings of a method that does not look at those of ``names``.
    names : iterable of str
        The settings.
    reason : str
        Why it has no use for them, as a clause whose subject is the method.
    """
    for name in names:
        value = getattr(config, name)
        if value != getattr(PLPHPConfig, name):
            raise ConfigError(f"{config.method} {reason}: leave out {name}, got {value!r}.")
