# SPDX-License-Identifier: Apache-2.0
"""A layer with a sliding window or chunks, some of whose tokens may have left before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from plphp.errors import UnsupportedFeatureError
from plphp.pruning.packing import Packing

from .packed_masks import packed_mask


@dataclass(frozen=True)
class Gaps:
    """Rides on the keys of such a layer, so that the attention function fits the mask to them.

    Parameters
    ----------
    columns : Tensor
        int64 [batch, keys]; logical position of each key, -1 where a row is filled up.
    end : int
        Logical position behind the last token.
    """

    columns: Tensor
    end: int

    def mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """The mask for queries [batch, q_heads, query, dim], see `plphp.engines.hf.packed_masks.packed_mask`."""
        return packed_mask(mask, self.columns, query.shape[2], self.end, query.device)


class WindowLayer(DynamicSlidingWindowLayer):
    """Transformers' layer, which knows the position of each entry once tokens have left before it.

    The window is one of positions in the whole prompt, as in a run in which the tokens are masked. To transformers the
    layer says that it holds the whole window.

    Attributes
    ----------
    positions : Tensor or None
        int64 [batch, held], on the CPU; logical position of each entry, -1 where a row is filled up. None as long as
        all tokens in the window have their entries.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.positions: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, packing: Packing | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new entries, and let go of those that no later token sees.

        Parameters
        ----------
        key_states, value_states : Tensor
            [batch, kv_heads, new, dim].
        packing : Packing, optional
            Which tokens of the pass they are of, where some have left before the layer.
        """
        if self.positions is None and packing is None:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, new, _ = key_states.shape
        rows = torch.arange(new).expand(batch, -1) if packing is None else packing.rows
        columns = torch.cat([self._positions(batch), (rows + self.cumulative_length).where(rows >= 0, -1)], 1)
        self.cumulative_length += new if packing is None else packing.tokens
        keys, values = (
            torch.cat([held, new_states], dim=2) if held.numel() else new_states
            for held, new_states in ((self.keys, key_states), (self.values, value_states))
        )
        # What fills a row up may stand between two turns: the first that any row sees, not so many from the end.
        seen = ((columns >= 0) & (columns > self.cumulative_length - self.sliding_window)).any(0).nonzero()[:, 0]
        first = int(seen[0]) if len(seen) else keys.shape[2]
        # Copies, not views: else what no one sees any more would be kept alive.
        self.keys, self.values = keys[:, :, first:].clone(), values[:, :, first:].clone()
        self.positions = columns[:, first:]
        keys = keys[:]  # a view: the mark is on what is returned, not on what came
        keys.plphp_gaps = Gaps(columns, self.cumulative_length)  # type: ignore[attr-defined]
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; refused where tokens have left before the layer."""
        if self.positions is not None:
            raise UnsupportedFeatureError("A layer with a window cannot forget tokens of a prompt that some have left.")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.positions = None
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (numbers, or a bool mask)."""
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, indices: Tensor) -> None:
        if self.positions is not None:
            self.positions = self.positions[indices.cpu()]

    def _positions(self, batch: int) -> Tensor:
        """Those of the entries held, int64 [batch, held]."""
        if self.positions is not None:
            return self.positions
        held = self.keys.shape[2] if self.keys.numel() else 0
        return torch.arange(self.cumulative_length - held, self.cumulative_length).expand(batch, -1)
