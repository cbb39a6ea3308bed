# SPDX-License-Identifier: Apache-2.0
"""From the inputs of a prompt to the positions of its vision tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from plphp.errors import SpanError
from plphp.settings.config import QueryRows

from .base import Family, Inputs, VisionSegment
from .prompt_spans import PromptSpans

Grid = tuple[int, int, int] | None
"""``(frames, height, width)`` of an image in tokens, where its tokens form a grid."""

FEATURE_INPUTS = ("pixel_values", "pixel_values_videos", "pixel_values_images", "image_embeds", "video_embeds")
"""Inputs that carry images or videos, under any family."""


@dataclass(frozen=True)
class VisionSpans:
    """Where the vision tokens of a batch of prompts stand, in logical positions (0 is the first token seen).

    Parameters
    ----------
    segment : Tensor
        int64 [batch, seq]; number of the image within its row, -1 where there is no vision token to prune.
    valid : Tensor
        bool [batch, seq]; False on padding.
    start : int
        First position of the new prompt: what the cache held before it was planned.
    grids : tuple
        Per row, per image: ``(frames, height, width)`` in tokens or None.
    """

    segment: Tensor
    valid: Tensor
    start: int
    grids: tuple[tuple[Grid, ...], ...]

    @property
    def vision(self) -> Tensor:
        """bool [batch, seq]; True on the vision tokens of the new prompt."""
        return self.segment >= 0

    @property
    def end(self) -> int:
        """Position after the last prompt token."""
        return self.segment.shape[1]

    @cached_property
    def own(self) -> PromptSpans:
        """The same of the new prompt alone, for what is noted of it: a chat has hundreds of prompts."""
        return PromptSpans(self.start, self.segment[:, self.start :].clone(), self.grids)

    def token_grid(self, row: int, image: int) -> tuple[int, int] | None:
        """Return ``(rows, columns)`` of the tokens of an image, which stand row by row; None where they form no grid.

        The frames of a video stand one below the other, so that it has the rows of all of them.
        """
        grid = self.grids[row][image]
        return None if grid is None else (grid[0] * grid[1], grid[2])

    def repeated(self, times: int) -> VisionSpans:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        return VisionSpans(
            segment=self.segment.repeat_interleave(times, dim=0),
            valid=self.valid.repeat_interleave(times, dim=0),
            start=self.start,
            grids=tuple(grid for grid in self.grids for _ in range(times)),
        )


def find_spans(
    family: Family,
    config: PretrainedConfig,
    inputs: Inputs,
    *,
    past_length: int = 0,
    vision_mask: Tensor | None = None,
) -> VisionSpans:
    """Find the vision tokens of a batch of prompts.

    Parameters
    ----------
    family : Family
        Tells which token ids are vision tokens and how many each image takes.
    config : PretrainedConfig
        The model's config.
    inputs : mapping
        Arguments of ``generate``: ``input_ids`` int64 [batch, seq], ``attention_mask`` [batch, seq], and
        the image features. After an earlier turn, ``input_ids`` hold the whole conversation, or the new part
        alone with an ``attention_mask`` over the whole; the features are those of the new part
        (`plphp.engines.hf.conversation.turns.new_features`).
    past_length : int
        Tokens that the cache holds already; vision tokens among them are left as they are.
    vision_mask : Tensor, optional
        bool [batch, seq] over the whole conversation: the vision tokens, for prompts passed as
        ``inputs_embeds`` or for placeholder tokens that the family does not know.

    Returns
    -------
    VisionSpans

    Raises
    ------
    SpanError
        If the vision tokens cannot be found, or their number is not what the features fill.
    """
    valid = valid_tokens(inputs, past_length, vision_mask)
    if vision_mask is None:
        vision, segments = _placeholders_and_segments(family, config, inputs, valid, past_length)
    else:
        vision, segments = _checked(vision_mask, valid), None
    segment, grids = _number_segments(vision, segments)
    segment[~valid] = -1
    segment[:, :past_length] = -1  # a vision_mask marks earlier turns, too
    return VisionSpans(segment=segment, valid=valid, start=past_length, grids=grids)


def query_mask(spans: VisionSpans, rows: QueryRows) -> Tensor:
    """Mark the prompt tokens whose attention scores the vision tokens.

    Parameters
    ----------
    spans : VisionSpans
    rows : int, "text" or "text_after_first"
        Tokens at the end of each row's new prompt, ``"text"`` for all that follow its last vision token, or
        ``"text_after_first"`` for the text that follows its first image, between images too.

    Returns
    -------
    Tensor
        bool [batch, seq]; at least one token in each row, whatever the row ends with.
    """
    valid = spans.valid.clone()
    valid[:, : spans.start] = False
    from_end = valid.flip(1).cumsum(1).flip(1)
    if isinstance(rows, str):
        image = spans.vision
        if rows == "text_after_first":
            numbers = spans.segment.masked_fill(~image, spans.end)
            image = image & (spans.segment == numbers.amin(1, keepdim=True))
        text = valid & ~spans.vision & (image.flip(1).cumsum(1).flip(1) == 0)
        has_text = text.any(1, keepdim=True)
        return torch.where(has_text, text, valid & (from_end == 1))
    return valid & (from_end <= rows)


def valid_tokens(inputs: Inputs, past_length: int, vision_mask: Tensor | None = None) -> Tensor:
    """Mark the tokens of the whole conversation that are not padding.

    Returns
    -------
    Tensor
        bool [batch, seq]; False on padding.

    Raises
    ------
    SpanError
        If the inputs are no prompt, or a prompt that adds nothing to what the cache holds.
    """
    valid = padding_mask(inputs, past_length, vision_mask)
    if valid.shape[1] <= past_length:
        raise SpanError(
            f"The cache holds {past_length} tokens already and the prompt has {valid.shape[1]}: pass the whole "
            "conversation with at least one token more, or the new tokens with an attention_mask over the whole."
        )
    if not valid[:, past_length:].any(1).all():
        raise SpanError("A row of the prompt is all padding: every row needs at least one token.")
    return valid


def padding_mask(inputs: Inputs, past_length: int, vision_mask: Tensor | None = None) -> Tensor:
    """Mark the tokens that are not padding, also of a conversation shorter than what the cache holds.

    Returns
    -------
    Tensor
        bool [batch, seq]; False on padding.

    Raises
    ------
    SpanError
        If the inputs are no prompt.
    """
    batch, length = _prompt_shape(inputs, vision_mask)
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise SpanError(
            f"attention_mask must be [batch, seq] with the batch of input_ids {(batch, length)} and at least "
            f"their length, got {_shape(mask)}."
        )
    if mask.shape[1] > length + past_length:
        raise SpanError(
            f"attention_mask covers {mask.shape[1]} tokens, but input_ids hold {length} and the cache {past_length} "
            "tokens: pass the mask that belongs to them."
        )
    return mask.bool().cpu()


def _prompt_shape(inputs: Inputs, vision_mask: Tensor | None) -> tuple[int, int]:
    """Return batch and length of ``input_ids``, or of what stands in their place."""
    ids: Any = inputs.get("input_ids")
    if ids is None:
        ids = inputs.get("inputs_embeds", vision_mask)
    if ids is None:
        raise SpanError(f"The prompt has neither input_ids nor inputs_embeds; got {sorted(inputs)}.")
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        raise SpanError(f"input_ids must be [batch, seq], got {_shape(ids)}.")
    batch, length = ids.shape[:2]
    if batch == 0 or length == 0:
        raise SpanError(f"The prompt holds no tokens: input_ids have the shape {tuple(ids.shape[:2])}.")
    return batch, length


def _shape(value: object) -> str:
    return f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _checked(vision_mask: object, valid: Tensor) -> Tensor:
    """Return the user's mask of vision tokens as bool [batch, seq]."""
    if not isinstance(vision_mask, Tensor) or vision_mask.shape != valid.shape:
        raise SpanError(
            f"vision_mask must have the shape of the prompt {tuple(valid.shape)}, got {_shape(vision_mask)}."
        )
    return vision_mask.bool().cpu() & valid


def _placeholders_and_segments(
    family: Family, config: PretrainedConfig, inputs: Inputs, valid: Tensor, past_length: int
) -> tuple[Tensor, list[VisionSegment] | None]:
    """Mark the placeholder tokens of the new prompt, bool [batch, seq], and return the segments of its features.

    The segments are None where there are no features or where they do not tell the segments.
    """
    ids, length = inputs.get("input_ids"), valid.shape[1]
    if ids is None:
        raise SpanError(
            "The prompt has no input_ids, so its vision tokens cannot be found. Pass input_ids, or make the "
            "cache with PrunedCache.for_inputs(..., vision_mask=<bool [batch, seq]>)."
        )
    vision = torch.isin(ids, torch.tensor(family.vision_token_ids(config), device=ids.device))
    # A later turn's input_ids may leave out what the cache holds.
    vision = torch.nn.functional.pad(vision, (length - ids.shape[1], 0)).cpu()
    tokens_in_all = int(vision.sum())
    vision[:, :past_length] = False
    segments = family.segments(config, {**inputs, "input_ids": ids[:, past_length - length :]})
    features = [name for name in FEATURE_INPUTS if inputs.get(name) is not None]
    if features and tokens_in_all == 0:
        raise SpanError(
            f"{', '.join(features)} are given, but the prompt holds no vision token (ids "
            f"{family.vision_token_ids(config)} for {family.name}): put an image slot in the prompt, as the "
            "processor's apply_chat_template does."
        )
    if not features or segments is None:
        return vision & valid, None
    _check_fill(segments, int(vision.sum()), tokens_in_all, features, family)
    return vision, segments  # features fill the placeholders that the mask hides, too


def _check_fill(
    segments: list[VisionSegment], new_tokens: int, tokens_in_all: int, features: list[str], family: Family
) -> None:
    """Compare the vision tokens of the new prompt with what the features will fill."""
    expected = sum(segment.tokens for segment in segments)
    if expected == new_tokens:
        return
    if tokens_in_all == new_tokens:
        raise SpanError(
            f"The prompt holds {tokens_in_all} vision tokens but the images fill {expected}: make input_ids and "
            f"{', '.join(features)} with one processor call, and do not truncate the prompt."
        )
    whole = (
        "" if family.features else f", which for the family {family.name!r} is all that is understood (Family.features)"
    )
    raise SpanError(
        f"The new part of the conversation holds {new_tokens} vision tokens and the whole conversation "
        f"{tokens_in_all}, but the images fill {expected}: pass {', '.join(features)} of all images of the "
        f"conversation, or of the new ones alone{whole}."
    )


def _number_segments(
    vision: Tensor, segments: list[VisionSegment] | None
) -> tuple[Tensor, tuple[tuple[Grid, ...], ...]]:
    """Give each vision token the number of its image within its row.

    Returns
    -------
    Tensor
        int64 [batch, seq]; -1 where there is no vision token.
    tuple
        Per row, per image: its grid, see `VisionSpans.grids`.
    """
    if segments is None:
        return _number_runs(vision)
    # Features fill the placeholders in order, row by row, so the n-th vision token of the batch is known.
    sizes = torch.tensor([segment.tokens for segment in segments], dtype=torch.long)
    image_of_token = torch.repeat_interleave(torch.arange(len(segments)), sizes)
    segment = torch.full(vision.shape, -1)
    segment[vision] = image_of_token
    grids = []
    for row in segment:
        images = row[row >= 0].unique().tolist()
        first, last = (images[0], images[-1]) if images else (0, -1)
        grids.append(tuple(segments[image].grid for image in range(first, last + 1)))
        row[row >= 0] -= first
    return segment, tuple(grids)


def _number_runs(vision: Tensor) -> tuple[Tensor, tuple[tuple[Grid, ...], ...]]:
    """Take each contiguous run of vision tokens for an image without a grid."""
    before = torch.nn.functional.pad(vision, (1, 0))[:, :-1]
    number = (vision & ~before).cumsum(1) - 1
    segment = torch.where(vision, number, -1)
    return segment, tuple((None,) * int(row.max() + 1) for row in segment)
