# SPDX-License-Identifier: Apache-2.0
"""A cache that knows the conversation that it has read: what a later turn adds, and whether it goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .attachment import Attachment
from .history import History
from .layer import PrunedLayer
from .mrope import TurnPositions, turn_positions
from .registry import family_of
from .spans import find_spans, real_tokens
from .turns import new_features, new_tokens
from .types import VisionSpans


class ConversationCache(Cache):
    """A cache with the `History` of its tokens and images, and the rotary positions of its newest turn."""

    def __init__(self, attachment: Attachment, layers: list[CacheLayerMixin]) -> None:
        super().__init__(layers=layers)
        self.attachment = attachment
        self.history = History()
        self._turn: TurnPositions | None = None

    @property
    def turn(self) -> TurnPositions | None:
        """Positions of the newest turn of a model with m-RoPE."""
        return self._turn

    @property
    def _pruned_layers(self) -> list[PrunedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PrunedLayer)]

    def begin_turn(
        self, inputs: Mapping[str, Any], vision_mask: Tensor | None = None
    ) -> tuple[VisionSpans, dict[str, Any]]:
        """Find the new vision tokens of a conversation, and place its new tokens.

        Returns
        -------
        spans : VisionSpans
            Of the new tokens.
        turn : dict
            What ``model(...)`` has to be given, see `plphp.turns.new_tokens`.

        Raises
        ------
        SpanError, HistoryError, UnsupportedFeatureError
        """
        model, past_length = self.attachment.model, self.get_seq_length()
        narrowed, real = self._new_features(inputs, vision_mask)
        spans = find_spans(
            family_of(model.config), model.config, narrowed, past_length=past_length, vision_mask=vision_mask
        )
        before = None
        if self._turn is not None:
            before = self._turn.before if self._turn.start == past_length else self._turn.after
        self._turn = turn_positions(model, narrowed, real, past_length, before, bool(spans.vision.any()))
        return spans, self._turn_inputs(narrowed, real)

    def read_turn(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """What ``model(...)`` has to be given of a conversation whose turn has begun, and its padding mask."""
        narrowed, real = self._new_features(inputs, None)
        return self._turn_inputs(narrowed, real), real

    def _new_features(self, inputs: Mapping[str, Any], vision_mask: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        """Compare a conversation with what was read, note it, and leave out the images that the cache holds."""
        model, past_length = self.attachment.model, self.get_seq_length()
        ids, real = inputs.get("input_ids"), real_tokens(inputs, past_length, vision_mask)
        self.history.cut(past_length)
        packed = max(layer.prefix_length for layer in self._pruned_layers)
        self.history.check_tokens(ids, real, packed)
        narrowed, sent = new_features(family_of(model.config), model.config, inputs, past_length, real.shape[1])
        self.history.check_images(sent, len(real))
        self.history.note_prompt(ids, real, past_length, sent)
        return narrowed, real

    def _turn_inputs(self, narrowed: Mapping[str, Any], real: Tensor) -> dict[str, Any]:
        positions = None if self._turn is None else self._turn.positions
        return new_tokens(narrowed, self.get_seq_length(), real.shape[1], positions)

    def note_answer(self, output: Any) -> None:
        """Note the tokens that ``generate`` returned, in either form."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        self.history.note_answer(sequences, self.get_seq_length())

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens, see `transformers.Cache.crop`."""
        super().crop(*args, **kwargs)
        self.history.cut(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.history.clear()
        self._turn = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (numbers, or a bool mask)."""
        self._select_history(indices)
        super().batch_select_indices(indices)
        if self._turn is not None:
            after = self._turn.after
            self._turn = replace(self._turn, after=after[indices.to(after.device)], before=None, start=-1)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select_history(torch.arange(len(self.history.ids)).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, as beam search does."""
        self._select_history(beam_idx)
        super().reorder_cache(beam_idx)

    def _select_history(self, indices: Tensor) -> None:
        if len(self.history.ids) == self._pruned_layers[0].batch_size:
            self.history.select(indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices)
        else:  # several sequences of each prompt are in the making
            self.history.clear()
