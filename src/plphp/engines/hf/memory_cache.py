# SPDX-License-Identifier: Apache-2.0
"""A cache that remembers images within a budget: which it holds, and how they fade."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans
from plphp.pruning.fading import Fading, fade
from plphp.pruning.image_table import ImageTable
from plphp.pruning.noting import note_placed
from plphp.pruning.placement import LayerPlacement
from plphp.pruning.tail_tokens import TailTokens

from .attachment import Attachment
from .packed_cache import PackedCache


class MemoryCache(PackedCache):
    """A cache whose images fade when they take more than a budget.

    Attributes
    ----------
    fading : Fading or None
        The budget, and how images fade; None without one. Then nothing is noted of images.
    """

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment)
        self.fading: Fading | None = None
        self._images = ImageTable()

    def note_placed(self, tokens: TailTokens, part: LayerPlacement, spans: VisionSpans) -> None:
        """Note of which tokens the entries of a layer are that has just been placed."""
        if self.fading is not None:
            note_placed(self._pruned[part.scores.layer], tokens, part, spans.start)

    def end_prompt(self, spans: VisionSpans) -> None:
        """Note the images of a prompt that all layers have read, and let images fade."""
        if self.fading is not None:
            self._images.note(spans, len(self.history.prompts))
            fade(self._pruned, self._images, self.fading)

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        self._images = ImageTable()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (numbers, or a bool mask)."""
        super().batch_select_indices(indices)
        self._select_images(indices.nonzero()[:, 0].tolist() if indices.dtype is torch.bool else indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        rows = range(len(self._images.rows))
        self._select_images([row for row in rows for _ in range(repeats)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self._select_images(beam_idx.tolist())

    def _select_images(self, rows: Sequence[int]) -> None:
        if self.fading is not None:
            self._images.select(rows)
