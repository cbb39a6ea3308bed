# SPDX-License-Identifier: Apache-2.0
"""What a cache without a budget holds of each image of a conversation, by what its report says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .quantities import human_bytes

if TYPE_CHECKING:
    from plphp.pruning.prompt_report import ImageReport, PromptReport
    from plphp.pruning.report import PruneReport


@dataclass(frozen=True)
class ImageHeld:
    """What is held of an image, in a cache without a budget, which does not know of which image an entry is.

    Parameters
    ----------
    number : int
        Its number in the conversation, from 0.
    first, last : int
        Positions of its first and its last vision token.
    tokens : int
        Its vision tokens.
    vision_kept : float
        Fraction of its entries that is held, whole or in few bits, over layers and KV heads.
    nbytes : int
        Bytes that hold it. Where several images came with a turn, whose rungs do not say whose the codes are, its share
        by entries of what holds them all.
    whole_bytes : int
        Bytes that it would take whole.
    """

    number: int
    first: int
    last: int
    tokens: int
    vision_kept: float
    nbytes: int
    whole_bytes: int

    @property
    def held(self) -> float:
        """Its bytes as a fraction of those that it would take whole."""
        return self.nbytes / self.whole_bytes if self.whole_bytes else 0.0

    def values(self) -> dict[str, Any]:
        """Return it ready for JSON, with `held`, under the names of `plphp.pruning.image_report.ImageMemory`."""
        return {**dataclasses.asdict(self), "held": self.held}


def images_held(report: PruneReport, row: int = 0) -> list[ImageHeld]:
    """Return what is held of each image of a row, in the order in which they came.

    Parameters
    ----------
    report : PruneReport
        Report of the cache.
    row : int
        Row of the batch.
    """
    held: list[ImageHeld] = []
    for prompt in report.prompts:
        held += [_held(prompt, image, row, len(held) + index) for index, image in enumerate(prompt.images[row])]
    return held


def images_table(images: list[ImageHeld]) -> Table:
    """Table of what is held of each image."""
    table = Table(title="what is held of each image")
    for heading in ("image", "tokens", "at", "bytes", "held", "kept"):
        table.add_column(heading, justify="right")
    for image in images:
        where = f"{image.first}-{image.last}"
        table.add_row(
            str(image.number),
            str(image.tokens),
            where,
            human_bytes(image.nbytes),
            f"{image.held:.1%}",
            f"{image.vision_kept:.0%}",
        )
    return table


def _held(prompt: PromptReport, image: ImageReport, row: int, number: int) -> ImageHeld:
    positions = set(image.positions)
    entries, heads, nbytes, whole = 0, 0, 0.0, 0
    for layer in prompt.layers:
        kept = layer.rows[row]
        own = sum(len(positions.intersection(head)) for head in kept.kept_positions)
        entries += own
        heads += len(kept.kept_positions)
        nbytes += kept.vision_bytes * own / max(1, sum(kept.kept))
        whole += kept.entry_bytes * len(positions) * len(kept.kept_positions)
    share = entries / (len(positions) * heads) if positions and heads else 1.0
    ends = min(image.positions, default=prompt.start), max(image.positions, default=prompt.start)
    return ImageHeld(number, *ends, len(positions), share, round(nbytes), whole)
