# SPDX-License-Identifier: Apache-2.0
"""Where the vision tokens of one prompt of a conversation stand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PromptSpans:
    """Where the images of a prompt stand among its own tokens.

    Parameters
    ----------
    start : int
        Logical position of its first token.
    segment : Tensor
        int64 [batch, tokens]; number of the image within its row, -1 where there is no vision token to prune.
    grids : tuple
        Per row, per image: ``(frames, height, width)`` in tokens or None.
    """

    start: int
    segment: Tensor
    grids: tuple[tuple[tuple[int, int, int] | None, ...], ...]

    @property
    def vision(self) -> Tensor:
        """bool [batch, tokens]; True on vision tokens."""
        return self.segment >= 0

    @property
    def end(self) -> int:
        """Logical position after the last token."""
        return self.start + self.segment.shape[1]

    def positions(self, mask: Tensor) -> list[list[int]]:
        """Logical positions of a mask, bool [rows, tokens], row by row."""
        return [(row.nonzero()[:, 0] + self.start).tolist() for row in mask]

    def repeated(self, times: int) -> PromptSpans:
        """Repeat every row."""
        grids = tuple(grid for grid in self.grids for _ in range(times))
        return PromptSpans(self.start, self.segment.repeat_interleave(times, dim=0), grids)
