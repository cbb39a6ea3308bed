# SPDX-License-Identifier: Apache-2.0
"""Values of options that are lists by commas."""

from __future__ import annotations

from plphp.errors import ConfigError


def names(text: str | None, option: str) -> tuple[str, ...] | None:
    """Texts by commas; None where the option is left out."""
    if text is None:
        return None
    listed = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not listed:
        raise ConfigError(f"{option} takes one or several, separated by commas, got {text!r}: leave it out for all.")
    return listed


def retentions(text: str | None) -> tuple[float, ...] | None:
    """Retentions by commas, likewise."""
    try:
        listed = names(text, "--target-retention")
        return None if listed is None else tuple(map(float, listed))
    except ValueError:
        raise ConfigError(f"--target-retention must be numbers by commas, such as 0.5,0.25, got {text!r}.") from None
