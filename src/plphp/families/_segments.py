# SPDX-License-Identifier: Apache-2.0
"""Helpers shared by the family files: from what the processors return to the segments of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import Features, Inputs, Kind, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TokenIds = Callable[["PretrainedConfig"], tuple[int, ...]]
Segments = Callable[["PretrainedConfig", Inputs], list[VisionSegment] | None]


def token_ids(*attributes: str) -> TokenIds:
    """Return a function that reads the placeholder ids from the named attributes of a config.

    An attribute that the config lacks, or that is None, is left out: older checkpoints of a family may know
    images only.
    """

    def read(config: PretrainedConfig) -> tuple[int, ...]:
        values = (getattr(config, name, None) for name in attributes)
        return tuple(dict.fromkeys(int(value) for value in values if value is not None))

    return read


image_ids = token_ids("image_token_id")
video_ids = token_ids("video_token_id")
image_and_video_ids = token_ids("image_token_id", "video_token_id")


def rows_of(value: Any) -> list[tuple[int, ...]]:
    """Return a tensor, an array or nested lists as a list of tuples of int; None as an empty list."""
    if value is None:
        return []
    rows = value.tolist() if hasattr(value, "tolist") else value
    return [tuple(int(number) for number in row) for row in rows]


def grid_segment(frames: int, rows: int, columns: int, kind: Kind = "image") -> VisionSegment:
    """Return the segment of an image or a video whose tokens form a grid."""
    return VisionSegment(frames * rows * columns, (frames, rows, columns), kind)


# --- images and tiles of the tower's size -----------------------------------------------------------------


def patch_size(config: PretrainedConfig) -> tuple[int, int]:
    """Return height and width of a patch in pixels; configs hold a number or a pair of them."""
    size: int | Iterable[int] = config.vision_config.patch_size
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def patch_grid(config: PretrainedConfig, pixel_values: Any) -> tuple[int, int]:
    """Return rows and columns of the patches of each image in ``pixel_values`` [..., height, width], in pixels."""
    patch_height, patch_width = patch_size(config)
    return pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width


def one_per_patch(config: PretrainedConfig, patches: int) -> int:
    """Return the tokens of a row or a column of patches where each patch is a token."""
    return patches


def image_count(inputs: Inputs) -> int:
    """Count the images of ``pixel_values`` (images, channels, height, width)."""
    return len(inputs["pixel_values"])


def equal_tiles(
    tokens: Callable[[PretrainedConfig, int], int] = one_per_patch, count: Callable[[Inputs], int] = image_count
) -> Segments:
    """Return the `Family.segments` of a family whose images, or tiles, all have the size of ``pixel_values``.

    Parameters
    ----------
    tokens : callable
        ``(config, patches) -> int``: tokens of a row, or of a column, of so many patches.
    count : callable
        ``inputs -> int``: images in ``pixel_values``.
    """

    def segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
        pixel_values = inputs.get("pixel_values")
        if pixel_values is None:
            return in_prompt_order(inputs, {config.image_token_id: []})
        rows, columns = (tokens(config, patches) for patches in patch_grid(config, pixel_values))
        return in_prompt_order(inputs, {config.image_token_id: [grid_segment(1, rows, columns)] * count(inputs)})

    return segments


# --- images of their own size -----------------------------------------------------------------------------


def sized_images(sizes: Any, step: tuple[int, int]) -> list[VisionSegment]:
    """Return the segments of images that keep their own size.

    Parameters
    ----------
    sizes : Tensor or nested lists
        ``(height, width)`` of each image.
    step : tuple of int
        Height and width of what becomes a token, in the unit of ``sizes``.
    """
    return [grid_segment(1, height // step[0], width // step[1]) for height, width in rows_of(sizes)]


# --- flattened patches with grids -------------------------------------------------------------------------


def merged_grids(config: PretrainedConfig, value: Any, kind: Kind = "image") -> list[VisionSegment]:
    """Turn ``image_grid_thw`` or ``video_grid_thw`` (items, 3), in patches, into segments."""
    merge = config.vision_config.spatial_merge_size
    return [grid_segment(frames, height // merge, width // merge, kind) for frames, height, width in rows_of(value)]


def grids_of_images_and_videos(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    """Return the segments of Qwen-like inputs; it is a `Family.segments`."""
    return in_prompt_order(
        inputs,
        {
            config.image_token_id: merged_grids(config, inputs.get("image_grid_thw")),
            # Qwen3-VL and later put a timestamp before each frame: a video is a single segment of several runs
            config.video_token_id: merged_grids(config, inputs.get("video_grid_thw"), "video"),
        },
    )


def grid_features(
    images: TokenIds = image_ids,
    videos: TokenIds = video_ids,
    image_type: int | None = None,
    video_type: int | None = None,
) -> tuple[Features, Features]:
    """Return how Qwen-like inputs hold images and videos: flattened patches, and their grids.

    Parameters
    ----------
    images, videos : callable
        ``config -> tuple of int``: the ids of their placeholders.
    image_type, video_type : int, optional
        Their values in ``mm_token_type_ids``, see `Features`.
    """
    return (
        Features(images, ("pixel_values",), ("image_grid_thw",), _patches("image_grid_thw"), image_type),
        Features(
            videos,
            ("pixel_values_videos",),
            ("video_grid_thw", "second_per_grid_ts"),
            _patches("video_grid_thw"),
            video_type,
        ),
    )


def _patches(name: str) -> Callable[[Inputs], list[int]]:
    """Return a function that counts the patches of each image from the grids (items, 3) in the named input."""
    return lambda inputs: [frames * height * width for frames, height, width in rows_of(inputs.get(name))]


# --- the order of segments --------------------------------------------------------------------------------


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
        turn whose ``input_ids`` still hold the placeholders of an earlier turn.
    """
    filled = {token: queue for token, queue in segments.items() if queue}
    if len(filled) <= 1:
        return [segment for queue in filled.values() for segment in queue]
    input_ids = inputs.get("input_ids")
    if input_ids is None:
        return None
    import torch  # families are listed without it

    flat = input_ids.reshape(-1)
    placeholders = flat[torch.isin(flat, torch.tensor(list(filled), device=flat.device))].tolist()
    expected = sum(segment.tokens for queue in filled.values() for segment in queue)
    if len(placeholders) < expected:  # truncated: the caller shall see the numbers
        return [segment for queue in filled.values() for segment in queue]
    return None if len(placeholders) > expected else _interleaved(placeholders, filled)


def _interleaved(placeholders: list[int], filled: Mapping[int, Sequence[VisionSegment]]) -> list[VisionSegment] | None:
    """Take the segments in the order of the placeholder ids of the prompt; None where a segment would mix ids."""
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
