# SPDX-License-Identifier: Apache-2.0
"""The images of a conversation: which tokens of which row are whose."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from plphp.families.spans import Grid, VisionSpans


@dataclass(frozen=True)
class TableImage:
    """An image, a tile or a video that was read.

    Parameters
    ----------
    turn : int
        Turn of the conversation that brought it, from 1.
    prompt : int
        Logical position at which the prompt of that turn begins.
    positions : Tensor
        int64 [tokens]; logical positions of its vision tokens, rising.
    grid : tuple of int, optional
        ``(frames, height, width)`` in tokens, where they form a grid.
    age : int
        By which images are put in the order of time: a restored image is the newest.
    rotary : Tensor, optional
        int32 [3, span]; for a model with m-RoPE the positions of all tokens from its first to its last.
    forgotten : bool
        Whether it was forgotten, and not restored since.
    attention : float
        How far the newest answer turns to it, see `plphp.pruning.asked_images.AskedImages`.
    """

    turn: int
    prompt: int
    positions: Tensor
    grid: Grid
    age: int
    rotary: Tensor | None = None
    forgotten: bool = False
    attention: float = 0.0

    @property
    def first(self) -> int:
        """Logical position of its first vision token."""
        return int(self.positions[0])

    @property
    def last(self) -> int:
        """Logical position of its last vision token."""
        return int(self.positions[-1])


class ImageTable:
    """The images of each row, oldest first.

    Attributes
    ----------
    rows : list of list of TableImage
    """

    def __init__(self) -> None:
        self.rows: list[list[TableImage]] = []
        self._of_token = torch.zeros(0, 0, dtype=torch.int64)
        self._time = 0

    def copied(self) -> ImageTable:
        """The same, which further prompts do not change."""
        result = copy.copy(self)
        result.rows = [list(row) for row in self.rows]
        return result

    def note(self, spans: VisionSpans, turn: int, rotary: Tensor | None = None) -> None:
        """Add the images of a prompt.

        Parameters
        ----------
        spans : VisionSpans
            Where they are.
        turn : int
            Turn of the conversation, from 1.
        rotary : Tensor, optional
            int64 [3, rows, tokens]; positions of the tokens of the prompt, for a model with m-RoPE. Rows of the prompt
            may have been repeated since.
        """
        batch = len(spans.segment)
        if not self.rows:
            self.rows = [[] for _ in range(batch)]
            self._of_token = torch.full((batch, 0), -1)
        self._of_token = pad(self._of_token, (0, spans.end - self._of_token.shape[1]), value=-1)
        for row, segment in enumerate(spans.segment):
            for number in segment[segment >= 0].unique().tolist():
                positions = (segment == number).nonzero()[:, 0]
                grids = spans.grids[row]
                grid = grids[number] if number < len(grids) else None
                of_image = None
                if rotary is not None:
                    own = rotary[:, row // (batch // rotary.shape[1])].cpu()
                    of_image = own[:, positions[0] - spans.start : positions[-1] + 1 - spans.start].to(torch.int32)
                self._of_token[row, positions] = len(self.rows[row])
                self.rows[row].append(TableImage(turn, spans.start, positions, grid, self._tick(), of_image))

    def numbered(self) -> list[tuple[int, int]]:
        """All images by number: row, and place in the row. Turn after turn, and of a turn row after row."""
        images = [(image.turn, row, place) for row, own in enumerate(self.rows) for place, image in enumerate(own)]
        return [(row, place) for _, row, place in sorted(images)]

    def of_tokens(self, row: Tensor, position: Tensor) -> Tensor:
        """The image of each token, its place in its row, int64 [tokens]; -1 for text. Row and position as int64."""
        length = self._of_token.shape[1]
        if length == 0:
            return torch.full_like(position, -1)
        found = self._of_token[row, position.clamp(max=length - 1)]
        return found.masked_fill(position >= length, -1)

    def prompts_of(self, row: Tensor, image: Tensor) -> Tensor:
        """The logical position at which the prompt of each image begins, int64; -1 where there is no image."""
        most = max(1, *(len(own) for own in self.rows))
        starts = [[*(image.prompt for image in own), *[-1] * (most - len(own))] for own in self.rows]
        return torch.tensor(starts)[row, image.clamp(min=0)].masked_fill(image < 0, -1)

    def live_tokens(self, row: int) -> int:
        """Vision tokens of the images of a row that are not forgotten."""
        return sum(len(image.positions) for image in self.rows[row] if not image.forgotten)

    @property
    def turns(self) -> int:
        """How many turns brought images."""
        return len({image.turn for own in self.rows for image in own})

    def ages(self, row: int) -> list[int]:
        """The age of each image of a row."""
        return [image.age for image in self.rows[row]]

    def live_share(self, row: int) -> float:
        """Share of the vision tokens of a row whose images are not forgotten."""
        tokens = sum(len(image.positions) for image in self.rows[row])
        return self.live_tokens(row) / tokens if tokens else 0.0

    def mark_forgotten(self, row: int, place: int) -> None:
        """Note that an image was forgotten."""
        self.rows[row][place] = replace(self.rows[row][place], forgotten=True)

    def mark_restored(self, row: int, place: int) -> None:
        """Note that an image was restored."""
        self.rows[row][place] = replace(self.rows[row][place], forgotten=False, age=self._tick())

    def note_attention(self, figures: Sequence[Sequence[float]]) -> None:
        """Note, by row and image, how far an answer turns to it."""
        self.rows = [
            [replace(image, attention=figure) for image, figure in zip(row, own, strict=True)]
            for row, own in zip(self.rows, figures, strict=True)
        ]

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def select(self, rows: Sequence[int]) -> None:
        """Take rows in a new order."""
        if self.rows:
            self.rows = [list(self.rows[row]) for row in rows]
            self._of_token = self._of_token[list(rows)]
