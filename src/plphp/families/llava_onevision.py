# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: tiles for a single image, no tiles for several images, pooled frames for videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from plphp.errors import UnsupportedFeatureError

from ._segments import image_and_video_ids, image_ids, in_prompt_order, rows_of, video_ids
from .base import Family, Features, Inputs, VisionSegment
from .llava_next import base_tokens, unpadded_grid
from .towers import VisionTower, class_token_of_clip

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _tiled(config: PretrainedConfig, size: tuple[int, ...], base: int) -> VisionSegment:
    """Return the segment of an image that is alone in its row: whole image, tiles, a newline per row of patches."""
    rows, columns = unpadded_grid(config, size)
    side = config.vision_config.image_size // config.vision_config.patch_size
    max_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (max_tiles * side**2))
    if ratio > 1.1:  # the model scales the tiles down
        rows, columns = int(rows // ratio), int(columns // ratio)
    return VisionSegment(base + rows * (columns + 1))


def _segments(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    base = base_tokens(config)
    if base is None:
        return None
    sizes = rows_of(inputs.get("image_sizes"))
    per_row = inputs.get("batch_num_images")
    alone = [True] * len(sizes) if per_row is None else [int(n) == 1 for n in per_row for _ in range(int(n))]
    images = [
        _tiled(config, size, base) if single else VisionSegment(base + 1)  # + 1: newline
        for size, single in zip(sizes, alone, strict=False)  # as the model does, see _Tiled
    ]
    videos: list[VisionSegment] = []
    pixel_values = inputs.get("pixel_values_videos")
    if pixel_values is not None:
        count, frames = pixel_values.shape[:2]
        side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
        videos = [VisionSegment(frames * side * side + 1, None, "video")] * count  # + 1: newline
    return in_prompt_order(inputs, {config.image_token_id: images, config.video_token_id: videos})


class _Tiled(Features):
    """Images that are tiled if they are alone in their row of the conversation."""

    @property
    def names(self) -> tuple[str, ...]:
        """See `Features.names`."""
        return (*super().names, "batch_num_images")

    def pick(self, inputs: Inputs, numbers: Sequence[int]) -> dict[str, Any]:
        """See `Features.pick`; an image stays as it was cut, however many are left in its row."""
        picked = super().pick({**inputs, "batch_num_images": None}, numbers)
        per_row = inputs.get("batch_num_images")
        if per_row is None or not numbers:
            return picked
        import torch  # families are listed without it

        alone = [int(count) == 1 for count in per_row for _ in range(int(count))]
        return {**picked, "batch_num_images": torch.tensor(_counts([alone[number] for number in numbers]))}

    def _counts(self, inputs: Inputs) -> list[int] | None:
        per_row, counts = inputs.get("batch_num_images"), super()._counts({**inputs, "batch_num_images": None})
        fits = counts is None or per_row is None or sum(map(int, per_row)) == len(counts)
        return counts if fits else None


def _counts(alone: Sequence[bool]) -> list[int]:
    """Return numbers of images per row that tell the model which images are alone; it takes any but 1 for "not"."""
    counts = []
    runs = [(single, len(list(run))) for single, run in groupby(alone)]
    for number, (single, length) in enumerate(runs, 1):
        if not single and length == 1 and number < len(runs):
            raise UnsupportedFeatureError(
                "LLaVA-OneVision has no input to say that a new image of a batch is not tiled and the next image is: "
                "continue the conversations of this batch one by one."
            )
        # The model stops at the last image, so that a 2 says of a single image that it is not alone.
        counts += [1] * length if single else [max(length, 2)]
    return counts


FAMILY = Family(
    name="llava-onevision",
    model_types=("llava_onevision",),
    vision_token_ids=image_and_video_ids,
    segments=_segments,
    features=(
        _Tiled(image_ids, each=("image_sizes",)),
        Features(video_ids, ("pixel_values_videos",), ("image_sizes_videos",)),
    ),
    tower=VisionTower(
        "vision_tower",
        "vision_tower",
        {"multi_modal_projector": "mean", "image_newline": "zero"},
        class_token=class_token_of_clip,
        behind_video=1,  # transformers 5.17
    ),
    notes="The newline tokens are placeholders too and are evicted like patches.",
)
