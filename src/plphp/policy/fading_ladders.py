# SPDX-License-Identifier: Apache-2.0
"""Ladders for any number of bytes: those that were measured, and what lies between them.

A *family* is a row of measured ladders of the same rungs, from nothing to everything whole. At a level between two of
them the cumulative shares are between theirs; below the lowest they shrink in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from plphp.settings.ladder import Ladder


@dataclass(frozen=True)
class LadderFamily:
    """A row of ladders.

    Parameters
    ----------
    rungs : tuple of str
        Names of their rungs, the best first.
    ladders : tuple of str
        As `plphp.settings.ladder.Ladder.parse` reads them, the one with the fewest bytes first.
    """

    rungs: tuple[str, ...]
    ladders: tuple[str, ...]

    @cached_property
    def _steps(self) -> list[list[float]]:
        """By level, the share of the entries that is held in each rung or in a better one."""
        steps = [[0.0] * len(self.rungs)]
        for text in self.ladders:
            ladder = Ladder.parse(text)
            shares = dict(zip(ladder.names, ladder.cumulative(), strict=True))
            step: list[float] = []
            for rung in self.rungs:
                step.append(shares.get(rung, step[-1] if step else 0.0))
            steps.append(step)
        return steps

    @property
    def top(self) -> int:
        """The level at which everything is whole."""
        return len(self.ladders)

    def cumulative(self, level: float) -> list[float]:
        """The share of all entries that is held in each rung or in a better one, at a level in [0, `top`].

        >>> PRODUCT.cumulative(1), PRODUCT.cumulative(0.5)
        ([0.0, 0.05, 0.17, 0.44], [0.0, 0.025, 0.085, 0.22])
        """
        number = min(int(level), self.top - 1)
        part, below, above = level - number, self._steps[number], self._steps[number + 1]
        return [(1 - part) * low + part * high for low, high in zip(below, above, strict=True)]


PRODUCT = LadderFamily(("whole", "pr2", "rvq", "pq"), ("t5", "t7.5", "t10", "t15", "pr2", "whole"))
"""With codebooks."""
PLAIN = LadderFamily(("whole", "r4", "r3", "r2"), ("r15", "r20", "r4", "whole"))
"""Without."""
