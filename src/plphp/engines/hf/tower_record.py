# SPDX-License-Identifier: Apache-2.0
"""What is known of a vision tower after it has run."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TowerPass:
    """What was recorded while the tower read all images of a prompt, or all of its videos.

    Parameters
    ----------
    received : tuple of Tensor
        For each recorded layer, float32 [images, positions]: the attention that a patch receives, mean over the heads
        and the patches that see it, 0 on padding. It sums to 1 over the patches that see each other, those of an image
        or a frame. Rows and positions are those of the tower: a class token is a position, and towers that read images
        of several sizes put them one behind the other in a single row.
    class_rows : tuple of Tensor, or None
        For each recorded layer, float32 [images, positions]: the attention of the class token, mean over the heads,
        its attention to itself included. None where the tower has no class token.
    """

    received: tuple[Tensor, ...]
    class_rows: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class TowerRecord:
    """What a vision tower was recorded to do.

    Attributes
    ----------
    passes : list of TowerPass
        One each time that the tower ran: for a prompt, its images come first and its videos second. A pass is
        complete when the tower has returned.
    """

    passes: list[TowerPass] = field(default_factory=list)
