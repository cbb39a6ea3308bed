# SPDX-License-Identifier: Apache-2.0
"""What plphp has to know about one family of vision-language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig


Inputs = Mapping[str, Any]
"""The keyword arguments of ``generate``: ``input_ids``, ``attention_mask``, ``pixel_values``, ..."""


@dataclass(frozen=True)
class VisionSegment:
    """One image, tile or video in the order in which its tokens stand in the prompt.

    Parameters
    ----------
    tokens : int
        Vision tokens that the segment takes in the text model's prompt, in one run or in several.
    grid : tuple of int, optional
        ``(frames, height, width)`` in tokens with ``frames * height * width == tokens``; None where the tokens
        of the segment do not form one grid (several tiles, newline tokens).
    kind : {"image", "video"}
        What the segment was made from.
    """

    tokens: int
    grid: tuple[int, int, int] | None = None
    kind: Literal["image", "video"] = "image"


def no_segments(config: PretrainedConfig, inputs: Inputs) -> None:
    """Say that the inputs do not tell the segments: each contiguous run of vision tokens counts as one."""
    return


@dataclass(frozen=True)
class Family:
    """How to find the vision tokens of a model class.

    Parameters
    ----------
    name : str
        Name shown by ``plphp families``, for example ``"qwen2-vl"``.
    model_types : tuple of str
        Values of ``model.config.model_type`` that belong to the family.
    vision_token_ids : callable
        ``config -> tuple of int``: the ids of the placeholder tokens that image and video features replace.
    segments : callable
        ``(config, inputs) -> list of VisionSegment or None``: one entry per image, tile or video of the whole
        batch in prompt order (row by row), computed from the processor's outputs; None where they do not tell.
    notes : str
        What a user should know: layers that are never pruned, inputs that are not supported.
    """

    name: str
    model_types: tuple[str, ...]
    vision_token_ids: Callable[[PretrainedConfig], tuple[int, ...]]
    segments: Callable[[PretrainedConfig, Inputs], list[VisionSegment] | None] = no_segments
    notes: str = ""
