# SPDX-License-Identifier: Apache-2.0
"""From the inputs of a prompt to the positions of its vision tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from plphp.errors import SpanError
from plphp.settings.config import QueryRows

from .base import Family, Inputs, VisionSegment

Grid = tuple[int, int, int] | None

FEATURE_INPUTS = ("pixel_values", "pixel_values_videos", "pixel_values_images", "image_embeds", "video_embeds")
"""Inputs that carry images or videos, under any family."""


@dataclass(frozen=True)
class VisionSpans:
    """Where the vision tokens of a batch of prompts stand, in logical positions (0 is the first token seen).

    Parameters
    ----------
    segment : Tensor
        int64 [batch, seq]; number of the image within its row, -1 where there is no vision token to prune.
    real : Tensor
        bool [batch, seq]; False on padding.
    start : int
        First position of the new prompt: what the cache held before it was planned.
    grids : tuple
        Per row, per image: ``(frames, height, width)`` in tokens or None.
    """

    segment: Tensor
    real: Tensor
    start: int
    grids: tuple[tuple[tuple[int, int, int] | None, ...], ...]

    @property
    def vision(self) -> Tensor:
        """bool [batch, seq]; True on the vision tokens of the new prompt."""
        return self.segment >= 0

    @property
    def end(self) -> int:
        """Position after the last prompt token."""
        return self.segment.shape[1]

    def repeated(self, times: int) -> VisionSpans:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        return VisionSpans(
            segment=self.segment.repeat_interleave(times, dim=0),
            real=self.real.repeat_interleave(times, dim=0),
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
        Says which token ids are vision tokens and how many each image takes.
    config : PretrainedConfig
        The model's config.
    inputs : mapping
        What is passed to ``generate``: ``input_ids`` int64 [batch, seq], ``attention_mask`` [batch, seq], and
        the image features. After an earlier turn, ``input_ids`` hold the whole conversation, or the new part
        alone with an ``attention_mask`` over the whole; the features are those of the new part
        (`plphp.engines.hf.conversation.turns.new_features`).
    past_length : int
        Tokens that the cache holds already; vision tokens among them are left as they are.
    vision_mask : Tensor, optional
        bool [batch, seq] over the whole conversation: the vision tokens, for prompts given as
        ``inputs_embeds`` or for placeholder tokens that the family does not know.

    Returns
    -------
    VisionSpans

    Raises
    ------
    SpanError
        If the vision tokens cannot be found or do not match the features.
    """
    real = real_tokens(inputs, past_length, vision_mask)
    if vision_mask is None:
        ids = inputs.get("input_ids")
        if ids is None:
            raise SpanError(
                "The prompt has no input_ids, so its vision tokens cannot be found. Pass input_ids, or make the "
                "cache with PrunedCache.for_inputs(..., vision_mask=<bool [batch, seq]>)."
            )
        wanted = torch.tensor(family.vision_token_ids(config), device=ids.device)
        vision = torch.isin(ids, wanted)
        # A later turn's input_ids may leave out what the cache holds.
        vision = torch.nn.functional.pad(vision, (real.shape[1] - ids.shape[1], 0)).cpu()
        new_ids = ids[:, past_length - real.shape[1] :]
        segments = family.segments(config, {**inputs, "input_ids": new_ids})
        found = int(vision.sum())
        vision[:, :past_length] = False
        segments = _match_features(vision, found, segments, inputs, family, config)
    else:
        if not isinstance(vision_mask, Tensor) or vision_mask.shape != real.shape:
            raise SpanError(
                f"vision_mask must have the shape of the prompt {tuple(real.shape)}, got {_shape(vision_mask)}."
            )
        vision, segments = vision_mask.bool().cpu() & real, None
    # Features fill placeholders that the mask hides, too.
    segment, grids = _number_segments(vision if segments else vision & real, segments)
    segment[~real] = -1
    segment[:, :past_length] = -1  # a vision_mask marks earlier turns, too
    return VisionSpans(segment=segment, real=real, start=past_length, grids=grids)


def query_mask(spans: VisionSpans, rows: QueryRows) -> Tensor:
    """Mark the prompt tokens whose attention ranks the vision tokens.

    Returns
    -------
    Tensor
        bool [batch, seq]; the last ``rows`` tokens of each row's new prompt, or with ``"text"`` all its
        tokens after the last vision token. At least one token in each row.
    """
    real = spans.real.clone()
    real[:, : spans.start] = False
    from_end = real.flip(1).cumsum(1).flip(1)
    if rows == "text":
        vision_later = spans.vision.flip(1).cumsum(1).flip(1) > 0
        text = real & ~vision_later
        has_text = text.any(1, keepdim=True)
        return torch.where(has_text, text, real & (from_end == 1))
    return real & (from_end <= rows)


def real_tokens(inputs: Inputs, past_length: int, vision_mask: Tensor | None = None) -> Tensor:
    """Padding mask over the whole conversation.

    Returns
    -------
    Tensor
        bool [batch, seq]; False on padding.

    Raises
    ------
    SpanError
        If the inputs are no prompt, or one that adds nothing to what the cache holds.
    """
    real = padding_mask(inputs, past_length, vision_mask)
    if real.shape[1] <= past_length:
        raise SpanError(
            f"The cache holds {past_length} tokens already and the prompt has {real.shape[1]}: pass the whole "
            "conversation with at least one token more, or the new tokens with an attention_mask over the whole."
        )
    if not real[:, past_length:].any(1).all():
        raise SpanError("A row of the prompt is all padding: every row needs at least one token.")
    return real


def padding_mask(inputs: Inputs, past_length: int, vision_mask: Tensor | None = None) -> Tensor:
    """The same of a conversation that may be shorter than what the cache holds.

    Raises
    ------
    SpanError
        If the inputs are no prompt.
    """
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
    mask = inputs.get("attention_mask")
    if mask is None:
        real = torch.ones(batch, length, dtype=torch.bool)
    elif not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise SpanError(
            f"attention_mask must be [batch, seq] with the batch of input_ids {(batch, length)} and at least "
            f"their length, got {_shape(mask)}."
        )
    elif mask.shape[1] > length + past_length:
        raise SpanError(
            f"attention_mask covers {mask.shape[1]} tokens, but input_ids hold {length} and the cache {past_length} "
            "tokens: pass the mask that belongs to them."
        )
    else:
        real = mask.bool().cpu()
    return real


def _shape(value: object) -> str:
    return f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _match_features(
    new: Tensor,
    found: int,
    segments: list[VisionSegment] | None,
    inputs: Inputs,
    family: Family,
    config: PretrainedConfig,
) -> list[VisionSegment] | None:
    """Compare the ``new`` vision tokens of the prompt, of ``found`` in all, with what its image features will fill.

    Return the segments where there are features.
    """
    given = [name for name in FEATURE_INPUTS if inputs.get(name) is not None]
    if given and found == 0:
        raise SpanError(
            f"{', '.join(given)} are given, but the prompt holds no vision token (ids "
            f"{family.vision_token_ids(config)} for {family.name}): put an image slot in the prompt, as the "
            "processor's apply_chat_template does."
        )
    if not given or segments is None:
        return None
    expected, found_new = sum(segment.tokens for segment in segments), int(new.sum())
    if expected == found_new:
        return segments
    if found == found_new:
        raise SpanError(
            f"The prompt holds {found} vision tokens but the images fill {expected}: make input_ids and "
            f"{', '.join(given)} with one processor call, and do not truncate the prompt."
        )
    whole = (
        "" if family.features else f", which for the family {family.name!r} is all that is understood (Family.features)"
    )
    raise SpanError(
        f"The new part of the conversation holds {found_new} vision tokens and the whole conversation {found}, but the "
        f"images fill {expected}: pass {', '.join(given)} of all images of the conversation, or of the new ones "
        f"alone{whole}."
    )


def _number_segments(
    vision: Tensor, segments: list[VisionSegment] | None
) -> tuple[Tensor, tuple[tuple[Grid, ...], ...]]:
    """Give each vision token the number of its image within its row."""
    if segments is None:
        before = torch.nn.functional.pad(vision, (1, 0))[:, :-1]
        number = (vision & ~before).cumsum(1) - 1
        segment = torch.where(vision, number, -1)
        return segment, tuple((None,) * int(row.max() + 1) for row in segment)
    # Features fill the placeholders in order, row by row, so the n-th vision token of the batch is known.
    sizes = torch.tensor([segment.tokens for segment in segments])
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
