# SPDX-License-Identifier: Apache-2.0
"""What plphp has to know about a family of vision-language models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from .towers import VisionTower

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


Inputs = Mapping[str, Any]
"""The keyword arguments of ``generate``: ``input_ids``, ``attention_mask``, ``pixel_values``, ..."""

Kind = Literal["image", "video"]
"""What a segment was made from."""


@dataclass(frozen=True)
class VisionSegment:
    """An image, tile or video, listed in the order in which the tokens stand in the prompt.

    Parameters
    ----------
    tokens : int
        Vision tokens that the segment takes in the text model's prompt, in a single run or in several.
    grid : tuple of int, optional
        ``(frames, height, width)`` in tokens with ``frames * height * width == tokens``; None where the tokens
        of the segment do not form a grid (several tiles, newline tokens).
    kind : {"image", "video"}
        What the segment was made from.
    """

    tokens: int
    grid: tuple[int, int, int] | None = None
    kind: Kind = "image"


@dataclass(frozen=True)
class Features:
    """The inputs that hold the images of a batch, or its videos, row by row, and what belongs to each image.

    Parameters
    ----------
    token_ids : callable
        ``config -> tuple of int``: the ids of the placeholder tokens that these images fill.
    pixels : tuple of str
        Inputs with ``entries`` for each image along the first axis; the first of them says whether there are images.
    each : tuple of str
        Inputs with a single entry for each image along the first axis, such as sizes or grids.
    entries : callable, optional
        ``inputs -> sequence of int``: entries of ``pixels`` that each image has; None where each has a single entry.
    token_type : int, optional
        Value of ``mm_token_type_ids`` on the placeholders, where images and videos are written with the same id.
    """

    token_ids: Callable[[PretrainedConfig], tuple[int, ...]]
    pixels: tuple[str, ...] = ("pixel_values",)
    each: tuple[str, ...] = ()
    entries: Callable[[Inputs], Sequence[int]] | None = None
    token_type: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All inputs that belong to the images."""
        return self.pixels + self.each

    @property
    def of_videos(self) -> bool:
        """Whether they are videos."""
        return self.pixels[0].endswith("_videos")

    def placeholders(self, config: PretrainedConfig, inputs: Inputs) -> Tensor:
        """Mark the tokens of ``input_ids`` that the images fill, bool [batch, seq]."""
        import torch  # families are listed without it

        ids = inputs["input_ids"]
        mask = torch.isin(ids, torch.tensor(self.token_ids(config), device=ids.device))
        types = inputs.get("mm_token_type_ids")
        if self.token_type is not None and types is not None and types.shape == ids.shape:
            mask &= types.to(ids.device) == self.token_type
        return mask

    def items(self, inputs: Inputs) -> list[dict[str, Any]]:
        """Take the images apart: for each image the inputs of a prompt that shows it alone.

        Returns
        -------
        list of dict
            Empty where there are no images, or where the inputs do not have the form of the family's processor.
        """
        counts = self._counts(inputs)
        return [] if counts is None else [self.pick(inputs, [number]) for number in range(len(counts))]

    def pick(self, inputs: Inputs, numbers: Sequence[int]) -> dict[str, Any]:
        """Take the inputs of some of the images, in the form in which the model reads them.

        Parameters
        ----------
        inputs : mapping
            Inputs of all images; `items` can take them apart.
        numbers : sequence of int
            Numbers of the images to take, ascending from 0.

        Returns
        -------
        dict
            Inputs of these images; empty where there are none to take.
        """
        if not numbers:
            return {}
        counts = self._counts(inputs) or []
        ends = list(accumulate(counts))
        entries = [entry for number in numbers for entry in range(ends[number] - counts[number], ends[number])]
        return {
            name: _take(inputs[name], entries if name in self.pixels else list(numbers))
            for name in self.names
            if _length(inputs.get(name))
        }

    def _counts(self, inputs: Inputs) -> list[int] | None:
        """Count the entries of ``pixels`` of each image; None where the inputs do not fit together."""
        length = _length(inputs.get(self.pixels[0]))
        if not length:
            return None
        counts = [1] * length if self.entries is None else list(self.entries(inputs))
        sizes = {name: _length(inputs.get(name)) for name in self.names}
        fits = all(sizes[name] in (0, sum(counts)) for name in self.pixels)
        return counts if fits and all(sizes[name] in (0, len(counts)) for name in self.each) else None


def _length(value: Any) -> int:
    """Count the entries along the first axis; 0 for None and for a tensor without axes."""
    return 0 if value is None or getattr(value, "ndim", 1) == 0 else len(value)


def _take(value: Any, entries: list[int]) -> Any:
    """Take entries along the first axis; a view where they are consecutive."""
    first, last = entries[0], entries[-1]
    if last - first + 1 == len(entries):
        return value[first : last + 1]
    return value[entries] if hasattr(value, "shape") else [value[entry] for entry in entries]


def no_segments(config: PretrainedConfig, inputs: Inputs) -> None:
    """Return None: the inputs do not tell the segments, so each contiguous run of vision tokens counts as a segment."""
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
        ``(config, inputs) -> list of VisionSegment or None``: an entry per image, tile or video of the whole
        batch in prompt order (row by row), computed from the processor's outputs; None where they do not tell.
    notes : str
        What a user should know: layers that are never pruned, inputs that are not supported.
    features : tuple of Features
        How the inputs of images and of videos are taken apart, so that a later turn may pass those of the whole
        conversation; empty where a later turn has to pass the features of its new images alone. Those of images come
        before those of videos.
    tower : VisionTower, optional
        The vision tower; None where nothing is known of it, so that its attention says nothing of the tokens.
    """

    name: str
    model_types: tuple[str, ...]
    vision_token_ids: Callable[[PretrainedConfig], tuple[int, ...]]
    segments: Callable[[PretrainedConfig, Inputs], list[VisionSegment] | None] = no_segments
    notes: str = ""
    features: tuple[Features, ...] = ()
    tower: VisionTower | None = None
