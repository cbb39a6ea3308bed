# SPDX-License-Identifier: Apache-2.0
"""Controls that change the images in the place of the cache: images of uniform grey, and smaller images."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from plphp.errors import UnsupportedFeatureError
from plphp.inputs.prompt import count_vision_tokens

from .conversation import prompt_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.evaluation.tasks.task import Sample

GREY = (128, 128, 128)


def blank(sample: Sample) -> Sample:
    """The same sample with every image replaced by uniform grey of the same size."""
    return dataclasses.replace(sample, images=tuple(Image.new("RGB", image.size, GREY) for image in sample.images))


def smaller_inputs(
    model: PreTrainedModel,
    processor: Any,
    sample: Sample,
    retention: float,
    full: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Inputs for a sample whose images take about ``retention`` of their vision tokens.

    Where the number of vision tokens follows the size of an image, each image is resized to ``sqrt(retention)`` of
    its sides. Where a tower has one size, its input is made smaller and its position embeddings are interpolated;
    run the model inside `interpolated_positions` with such inputs.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin
    sample : Sample
    retention : float
        In (0, 1].
    full : dict, optional
        Inputs for the sample as it is, where the caller has them.

    Raises
    ------
    UnsupportedFeatureError
        If the images of this model cannot be made to take fewer tokens.
    """
    full = prompt_inputs(processor, sample) if full is None else full
    if retention == 1:
        return full
    before, factor = count_vision_tokens(model.config, full), math.sqrt(retention)
    resized = dataclasses.replace(sample, images=tuple(_resized(image, factor) for image in sample.images))
    inputs = prompt_inputs(processor, resized)
    if count_vision_tokens(model.config, inputs) < before:
        return inputs
    with _smaller_tower_input(model, processor, factor):
        inputs = prompt_inputs(processor, sample)
    if count_vision_tokens(model.config, inputs) >= before:
        raise _refusal(model, "its processor makes as many vision tokens of smaller images")
    return inputs


@contextmanager
def interpolated_positions(model: PreTrainedModel) -> Iterator[None]:
    """Let the vision tower take inputs of another size than it was trained with, by interpolated positions."""

    def ask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    embeddings = [module for module in model.modules() if hasattr(type(module), "interpolate_pos_encoding")]
    hooks = [module.register_forward_pre_hook(ask, with_kwargs=True) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _smaller_tower_input(model: PreTrainedModel, processor: Any, factor: float) -> Iterator[None]:
    """Give the image processor a smaller square size, a multiple of the patch, for a while."""
    image_processor = processor.image_processor
    vision = getattr(model.config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    can_interpolate = any(hasattr(type(module), "interpolate_pos_encoding") for module in model.modules())
    if not (isinstance(side, int) and isinstance(patch, int) and can_interpolate):
        raise _refusal(model, "its vision tower takes one size")
    smaller_side = max(1, round(side * factor / patch)) * patch
    names = [name for name in ("size", "crop_size") if getattr(image_processor, name, None) is not None]
    originals = {name: copy.copy(getattr(image_processor, name)) for name in names}
    try:
        for name in names:
            keys = dict(originals[name]).items()
            setattr(image_processor, name, {key: smaller_side for key, value in keys if value is not None})
        yield
    finally:
        for name, value in originals.items():
            setattr(image_processor, name, value)


def _resized(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _refusal(model: PreTrainedModel, reason: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"downsample does not work with this {model.config.model_type!r} model: {reason}. Leave it out."
    )
