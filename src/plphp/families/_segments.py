# SPDX-License-Identifier: Apache-2.0
"""Helpers shared by the family files: from what the processors return to the segments of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def token_ids(*attributes: str) -> Callable[[PretrainedConfig], tuple[int, ...]]:
    """Return a function that reads the placeholder ids from the named attributes of a config.

    An attribute that the config lacks, or that is None, is left out: older checkpoints of a family may know
    images only.
    """

    def read(config: PretrainedConfig) -> tuple[int, ...]:
        values = (getattr(config, name, None) for name in attributes)
        return tuple(dict.fromkeys(int(value) for value in values if value is not None))

    return read


def square(size: int | Iterable[int]) -> tuple[int, int]:
    """Return ``(height, width)`` of a config value that is one number or a pair of them."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def rows_of(value: Any) -> list[tuple[int, ...]]:
    """Return a tensor, an array or nested lists as a list of tuples of int; None as an empty list."""
    if value is None:
        return []
    rows = value.tolist() if hasattr(value, "tolist") else value
    return [tuple(int(number) for number in row) for row in rows]


def in_prompt_order(inputs: Inputs, segments: Mapping[int, Sequence[VisionSegment]]) -> list[VisionSegment] | None:
    """Arrange the segments of each placeholder id in the order in which their tokens stand in the prompt.

    Models fill the placeholders of a modality in order over the flattened batch, images and videos apart, so
    a prompt that mixes the two needs ``input_ids`` to be read in order. Whether the segments fill exactly the
    placeholders of the prompt is for the caller to compare.

    Parameters
    ----------
    inputs : mapping
        Inputs of ``generate``; ``input_ids`` (batch, seq) is read where several modalities have segments.
    segments : mapping
        Placeholder token id -> its segments, in the order of the features.

    Returns
    -------
    list of VisionSegment or None
        None where several modalities have segments and ``input_ids`` does not tell their order, as in a later
        turn whose ``input_ids`` still hold the placeholders of an earlier one.
    """
    filled = {token: queue for token, queue in segments.items() if queue}
    if len(filled) <= 1:
        return [segment for queue in filled.values() for segment in queue]
    input_ids = inputs.get("input_ids")
    if input_ids is None:
        return None
    import torch

    flat = input_ids.reshape(-1)
    placeholders = flat[torch.isin(flat, torch.tensor(list(filled), device=flat.device))].tolist()
    expected = sum(segment.tokens for queue in filled.values() for segment in queue)
    if len(placeholders) < expected:  # truncated: the caller shall see the numbers
        return [segment for queue in filled.values() for segment in queue]
    if len(placeholders) > expected:
        return None
    ordered: list[VisionSegment] = []
    queues = {token: iter(queue) for token, queue in filled.items()}
    start = 0
    while start < len(placeholders):
        segment = next(queues[placeholders[start]], None)
        if segment is None or len(set(placeholders[start : start + segment.tokens])) != 1:
            return None
        ordered.append(segment)
        start += segment.tokens
    return ordered


def grid_segments(value: Any, merge: int, kind: Any = "image") -> list[VisionSegment]:
    """Turn ``image_grid_thw`` or ``video_grid_thw`` (items, 3), in patches, into segments."""
    return [
        VisionSegment(frames * (height // merge) * (width // merge), (frames, height // merge, width // merge), kind)
        for frames, height, width in rows_of(value)
    ]


def grid_patches(name: str) -> Callable[[Inputs], list[int]]:
    """Return a function that counts the patches of each image from the grids (items, 3) in the named input."""
    return lambda inputs: [frames * height * width for frames, height, width in rows_of(inputs.get(name))]


def grid_features(
    image_ids: Callable[[PretrainedConfig], tuple[int, ...]],
    video_ids: Callable[[PretrainedConfig], tuple[int, ...]],
    image_type: int | None = None,
    video_type: int | None = None,
) -> tuple[Features, Features]:
    """Return how Qwen-like inputs hold images and videos: flattened patches, and their grids."""
    return (
        Features(image_ids, ("pixel_values",), ("image_grid_thw",), grid_patches("image_grid_thw"), image_type),
        Features(
            video_ids,
            ("pixel_values_videos",),
            ("video_grid_thw", "second_per_grid_ts"),
            grid_patches("video_grid_thw"),
            video_type,
        ),
    )


def real_images(inputs: Inputs) -> int:
    """Count the images of ``pixel_values`` (batch, images, channels, height, width) that are not all zeros.

    Idefics-like processors pad rows with fewer images by images of zeros, and the models drop those.
    """
    pixel_values = inputs.get("pixel_values")
    if pixel_values is None:
        return 0
    return int(pixel_values.flatten(0, 1).flatten(1).ne(0).any(dim=-1).sum())
