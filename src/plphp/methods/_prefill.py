# SPDX-License-Identifier: Apache-2.0
"""What methods of the prefill stage have in common."""

from __future__ import annotations

from plphp.errors import ConfigError
from plphp.settings.config import PLPHPConfig


def refuse_exempt_layers(config: PLPHPConfig) -> None:
    """A token that has left is missing in all later layers."""
    if config.exempt_layers:
        raise ConfigError(
            f"{config.method} takes tokens out of all later layers, so none of them can be exempt: leave out "
            f"exempt_layers, got {list(config.exempt_layers)}."
        )
