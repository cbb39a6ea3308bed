# SPDX-License-Identifier: Apache-2.0
"""How much memory the vision entries of a cache may take, and by which rule they fade when there are more.

::

    budget = integer                     bytes
           | number [" "] unit           "200MB", "1.5GiB"; B, kB, MB, GB, TB by 1000, KiB, MiB, GiB, TiB by 1024
           | integer " tokens"           the bytes that so many vision tokens take whole, in all layers and KV heads
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from plphp.errors import ConfigError

from .byte_counts import bytes_in
from .checks import check_choice

RULES = ("ranked", "oldest", "newest", "equal")
"""Names of the rules of `plphp.policy.fading_rules`; here they are known without torch."""
_TOKENS = re.compile(r"([0-9]+)\s*tokens?", re.IGNORECASE)


@dataclass(frozen=True)
class VisionBudget:
    """A budget of bytes, or of vision tokens.

    Parameters
    ----------
    nbytes, tokens : int or None
        One of them.
    """

    nbytes: int | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, value: object) -> VisionBudget:
        """Read a budget.

        Raises
        ------
        ConfigError
            If it is none, or 0.

        Examples
        --------
        >>> VisionBudget.parse("200MB").nbytes, VisionBudget.parse("1.5 KiB").nbytes
        (200000000, 1536)
        >>> VisionBudget.parse("2048 tokens").tokens
        2048
        """
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return cls(nbytes=value)
        text = value.strip() if isinstance(value, str) else ""
        if (tokens := _TOKENS.fullmatch(text)) and int(tokens[1]) >= 1:
            return cls(tokens=int(tokens[1]))
        # A text without a unit might mean tokens.
        if text[-1:].isalpha() and (nbytes := bytes_in(text)) is not None:
            return cls(nbytes=nbytes)
        raise ConfigError(
            f"vision_budget must be a number of bytes above 0, as in 200000000, 200MB or 1.5GiB, or of vision tokens, "
            f"as in '2048 tokens', got {value!r}."
        )

    def bytes_of(self, token_nbytes: int) -> int:
        """The budget in bytes, where a vision token takes so many, held whole in all layers and KV heads."""
        return self.nbytes if self.nbytes is not None else (self.tokens or 0) * token_nbytes


def check_budget(budget: object, fading: object, device: object) -> None:
    """Raise `ConfigError` unless the settings of a budget are valid, each by itself and together."""
    check_choice("fading", fading, RULES)
    if device not in (None, "cpu"):
        raise ConfigError(f"tier_device must be 'cpu' or None, got {device!r}: whole images wait in host memory.")
    if budget is not None:
        VisionBudget.parse(budget)
    elif device is not None:
        raise ConfigError(
            "tier_device=cpu is where images wait that a vision_budget has no room for: give one, as in "
            "vision_budget=200MB, or leave it out."
        )
    elif fading != RULES[0]:
        raise ConfigError(
            f"fading={fading} says how images fade under a vision_budget: give one, as in vision_budget=200MB, or "
            "leave it out."
        )
