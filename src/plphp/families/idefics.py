# SPDX-License-Identifier: Apache-2.0
"""Idefics2, Idefics3 and SmolVLM: a fixed number of tokens per tile; video frames are tiles too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._segments import equal_tiles, image_ids, in_prompt_order
from .base import Family, Features, Inputs, VisionSegment
from .towers import VisionTower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _valid_images(inputs: Inputs) -> list[list[int]]:
    """Return the row of each image, and its number in the row, of ``pixel_values`` (batch, images, ...).

    Processors pad rows with fewer images by images of zeros, and the models drop those.
    """
    pixel_values = inputs.get("pixel_values")
    if pixel_values is None:
        return []
    places: list[list[int]] = pixel_values.flatten(2).ne(0).any(dim=-1).nonzero().tolist()
    return places


def _count(inputs: Inputs) -> int:
    return len(_valid_images(inputs))


def _resampled(config: PretrainedConfig, inputs: Inputs) -> list[VisionSegment] | None:
    image = VisionSegment(config.perceiver_config.resampler_n_latents)  # latents have no place in the image
    return in_prompt_order(inputs, {config.image_token_id: [image] * _count(inputs)})


def _shuffled(config: PretrainedConfig, patches: int) -> int:
    return patches // config.scale_factor


class _Padded(Features):
    """Images as (batch, images, ...), rows with fewer of them padded by images of zeros."""

    def items(self, inputs: Inputs) -> list[dict[str, Any]]:
        """See `Features.items`."""
        return [
            {name: inputs[name][row, image][None, None] for name in self._present(inputs)}
            for row, image in _valid_images(inputs)
        ]

    def pick(self, inputs: Inputs, numbers: Sequence[int]) -> dict[str, Any]:
        """See `Features.pick`."""
        places = _valid_images(inputs)
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


_FEATURES = (_Padded(image_ids, each=("pixel_attention_mask",)),)

FAMILIES = (
    Family(
        "idefics2",
        ("idefics2",),
        image_ids,
        _resampled,
        "Refused where the Mistral text model has a sliding window, which all of its layers share.",
        _FEATURES,
        VisionTower("vision_model", None),
    ),
    Family(
        "idefics3",
        ("idefics3", "smolvlm"),
        image_ids,
        equal_tiles(_shuffled, _count),
        "A segment is a tile; row, column and frame markers between tiles count as text and are kept.",
        _FEATURES,
        VisionTower("vision_model", "vision_model", {"connector.modality_projection": "mean"}),
    ),
)
