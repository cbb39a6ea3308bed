# SPDX-License-Identifier: Apache-2.0
"""What is held of each image of a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .report_checks import check_numbers

NUMBERS = ("number", "row", "turn", "first", "last", "tokens", "whole_bytes", "nbytes", "vision_kept", "attention")
FADED, ASKED = 0.1, 0.65
"""An image is wanted back that is held in less than this part of its bytes, and that an answer turns to at least so
far, see `plphp.pruning.asked_images.AskedImages`."""


@dataclass(frozen=True)
class ImageMemory:
    """What a cache holds of an image, a tile or a video.

    Parameters
    ----------
    number : int
        By which `plphp.PrunedCache.forget` and ``restore`` know it. Images are numbered turn after turn, and of a turn
        row after row; where rows of the cache are chosen or repeated, they are numbered anew.
    row : int
        Row of the batch.
    turn : int
        Turn of the conversation that brought it, from 1.
    first, last : int
        Logical positions of its first and its last vision token.
    tokens : int
        Its vision tokens.
    grid : tuple of int, optional
        ``(frames, height, width)`` in tokens, where they form a grid.
    forgotten : bool
        Whether it was forgotten, and not restored since.
    entries : dict of str to int
        By the name of a rung, ``whole`` for the dtype of the model, how many entries are held in it, over the pruned
        layers and their KV heads.
    nbytes : int
        Their bytes, with the image's part of scales and means. What rows share counts for each of them.
    whole_bytes : int
        Bytes of all of its entries, held whole.
    vision_kept : float
        Entries held as a fraction of all.
    attention : float
        How far the newest answer turns to it in its first tokens, from 0 to 1: see
        `plphp.pruning.asked_images.AskedImages`. 0 where that was not looked at: in answers of fewer than three tokens,
        with beams, and in steps that are replayed from a CUDA graph.
    """

    number: int
    row: int
    turn: int
    first: int
    last: int
    tokens: int
    grid: tuple[int, int, int] | None
    forgotten: bool
    entries: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    whole_bytes: int = 0
    vision_kept: float = 0.0
    attention: float = 0.0

    @property
    def held(self) -> float:
        """Its bytes as a fraction of those of all of its entries held whole."""
        return self.nbytes / self.whole_bytes if self.whole_bytes else 0.0

    @property
    def wanted(self) -> bool:
        """Whether the newest answer turns to it though it has faded most of the way: restore it and ask again."""
        return self.attention >= ASKED and 0 < self.held < FADED

    def values(self) -> dict[str, Any]:
        """Return it ready for JSON, with `held` and `wanted`."""
        return {**dataclasses.asdict(self), "held": self.held, "wanted": self.wanted}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ImageMemory:
        """Read it from a report; raises TypeError for what is none."""
        grid = values.get("grid")
        image = cls(**{**values, "grid": tuple(grid) if grid else None})
        check_numbers(image, NUMBERS)
        return image
