# SPDX-License-Identifier: Apache-2.0
"""A cache that knows the conversation it has read: what a later turn adds, and whether that turn goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from plphp.engines.hf.attachment import Attachment
from plphp.engines.hf.layer import PrunedLayer
from plphp.families.registry import family_of
from plphp.families.spans import VisionSpans, find_spans, padding_mask, valid_tokens
from plphp.pruning.finite import features_of, refuse_damaged

from .history import History
from .mrope import TurnPositions, turn_positions
from .turns import SentImage, new_features

NOWHERE = -1
"""Start of a turn whose rows were changed after it was read: no plan begins there, so that the next goes on behind."""


class ConversationCache(Cache):
    """A cache with the `History` of its tokens and images, and the rotary positions of its newest turn."""

    def __init__(self, attachment: Attachment, layers: list[CacheLayerMixin]) -> None:
        super().__init__(layers=layers)
        self.attachment = attachment
        self.history = History()
        self._turn: TurnPositions | None = None

    @property
    def turn(self) -> TurnPositions | None:
        """Positions of the newest turn, for a model with m-RoPE; None for other models."""
        return self._turn

    @property
    def _pruned_layers(self) -> list[PrunedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PrunedLayer)]

    def follow_turn(self, conversation: ConversationCache, rows: int) -> None:
        """Go on from the end of a conversation of one row, with several copies of that row."""
        if conversation.turn is not None:
            after = conversation.turn.after.expand(rows, -1)
            self._turn = replace(conversation.turn, after=after, before=None, start=NOWHERE)

    def begin_turn(
        self, inputs: Mapping[str, Any], vision_mask: Tensor | None = None
    ) -> tuple[VisionSpans, dict[str, Any]]:
        """Find the new vision tokens of a conversation, and place its new tokens.

        Returns
        -------
        spans : VisionSpans
            Where the vision tokens among the new tokens are.
        turn : dict
            The inputs with the features of new images alone.

        Raises
        ------
        SpanError, HistoryError, UnsupportedFeatureError, NonFiniteAttentionError
            The cache is as before.
        """
        model, past_length = self.attachment.model, self.get_seq_length()
        turn, valid, sent = self._compared(inputs, vision_mask)
        spans = find_spans(
            family_of(model.config), model.config, turn, past_length=past_length, vision_mask=vision_mask
        )
        has_vision = bool(spans.vision.any())
        # In a batch the rows with sound images can still be read and pruned, see `plphp.pruning.finite`.
        if has_vision and len(valid) == 1:
            refuse_damaged(features_of(turn))
        before = None
        if self._turn is not None:
            # A turn may be planned twice before it is read, by the user and by `generate`.
            before = self._turn.before if self._turn.start == past_length else self._turn.after
        self._turn = turn_positions(model, turn, valid, past_length, before, has_vision)
        self.history.note_prompt(inputs.get("input_ids"), valid, past_length, sent)
        return spans, turn

    def read_turn(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """The inputs of a planned turn with the features of new images alone, and the conversation's padding mask."""
        turn, valid, sent = self._compared(inputs, None)
        self.history.note_prompt(inputs.get("input_ids"), valid, self.get_seq_length(), sent)
        return turn, valid

    def _compared(
        self, inputs: Mapping[str, Any], vision_mask: Tensor | None
    ) -> tuple[dict[str, Any], Tensor, list[SentImage]]:
        """Compare a conversation with what was read, and leave out the images that the cache holds."""
        model, past_length = self.attachment.model, self.get_seq_length()
        self.history.cut(past_length)
        packed = max(layer.prefix_length for layer in self._pruned_layers)
        # Before `valid_tokens`, which knows of a history that lost a part only that it is too short, and not where.
        self.history.check_tokens(inputs.get("input_ids"), padding_mask(inputs, past_length, vision_mask), packed)
        valid = valid_tokens(inputs, past_length, vision_mask)
        turn, sent = new_features(family_of(model.config), model.config, inputs, past_length, valid.shape[1])
        self.history.check_images(sent, len(valid))
        return turn, valid, sent

    def model_inputs(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """Make the arguments of ``model(...)`` that read a turn which has been planned.

        Parameters
        ----------
        turn : mapping
            The dict that `PrunedCache.plan` returned.

        Returns
        -------
        dict
            The new tokens, an ``attention_mask`` over the whole conversation, the features of the new images, and
            positions where the model cannot work them out from these; to be passed with this cache.
        """
        past_length = self.get_seq_length()
        valid, inputs = valid_tokens(turn, past_length), dict(turn)
        if self._turn is None and not valid.all():
            inputs.setdefault("position_ids", (valid.long().cumsum(1) - 1).clamp(min=0).to(turn["input_ids"].device))
        elif self._turn is not None and self._turn.positions is not None:
            inputs["position_ids"] = self._turn.positions
        new = valid.shape[1] - past_length if past_length else None
        # As `generate` does it: whether token types are those of the whole depends on the model and the release.
        prepare: Any = self.attachment.model.prepare_inputs_for_generation
        return dict(prepare(next_sequence_length=new, is_first_iteration=True, **inputs))

    def note_answer(self, output: Any) -> None:
        """Note the tokens that ``generate`` returned, as a tensor or in the field ``sequences`` of its output."""
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
            self._turn = replace(self._turn, after=after[indices.to(after.device)], before=None, start=NOWHERE)

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
        else:
            # Beams or several sequences of each prompt are in the making: these rows are none of the conversation.
            self.history.clear()
