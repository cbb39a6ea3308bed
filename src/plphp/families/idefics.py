# SPDX-License-Identifier: Apache-2.0
"""Idefics2, Idefics3 and SmolVLM: a fixed number of tokens per tile; video frames are tiles too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._segments import in_prompt_order, real_images, square, token_ids
from .base import Family, Features, Inputs, VisionSegment

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _resampled(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    image = VisionSegment(config.perceiver_config.resampler_n_latents)  # latents have no place in the image
    return in_prompt_order(inputs, {config.image_token_id: [image] * real_images(inputs)})


def _shuffled(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    pixel_values = inputs.get("pixel_values")
    if pixel_values is None:
        return in_prompt_order(inputs, {config.image_token_id: []})
    patch_height, patch_width = square(config.vision_config.patch_size)
    height = pixel_values.shape[-2] // patch_height // config.scale_factor
    width = pixel_values.shape[-1] // patch_width // config.scale_factor
    tile = VisionSegment(height * width, (1, height, width))
    return in_prompt_order(inputs, {config.image_token_id: [tile] * real_images(inputs)})


class _Padded(Features):
    """Images as (batch, images, ...), rows with fewer of them padded by images of zeros, which the model drops."""

    def items(self, inputs: Inputs) -> list[dict[str, Any]]:
        """See `Features.items`."""
        return [
            {name: inputs[name][row, image][None, None] for name in self._present(inputs)}
            for row, image in self._places(inputs)
        ]

    def pick(self, inputs: Inputs, numbers: Sequence[int]) -> dict[str, Any]:
        """See `Features.pick`."""
        places = self._places(inputs)
        kept: dict[int, list[int]] = {}
        for number in numbers:
            row, image = places[number]
            kept.setdefault(row, []).append(image)
        picked = {}
        for name in self._present(inputs) if kept else ():
            value = inputs[name]
            picked[name] = value.new_zeros(len(value), max(map(len, kept.values())), *value.shape[2:])
            for row, images in kept.items():
                picked[name][row, : len(images)] = value[row, images]
        return picked

    def _present(self, inputs: Inputs) -> list[str]:
        return [name for name in self.names if inputs.get(name) is not None]

    def _places(self, inputs: Inputs) -> list[list[int]]:
        """Row and number of each image that is not padding."""
        if not self._present(inputs):
            return []
        real: list[list[int]] = inputs[self.pixels[0]].flatten(2).ne(0).any(dim=-1).nonzero().tolist()
        return real


_FEATURES = (_Padded(token_ids("image_token_id"), each=("pixel_attention_mask",)),)

FAMILIES = (
    Family(
        "idefics2",
        ("idefics2",),
        token_ids("image_token_id"),
        _resampled,
        notes="Refused where the Mistral text model has a sliding window, which all of its layers share.",
        features=_FEATURES,
    ),
    Family(
        "idefics3",
        ("idefics3", "smolvlm"),
        token_ids("image_token_id"),
        _shuffled,
        "A segment is a tile; row, column and frame markers between tiles count as text and are kept.",
        features=_FEATURES,
    ),
)
