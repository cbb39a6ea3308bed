# SPDX-License-Identifier: Apache-2.0
"""The way from the patches of a vision tower to tokens, which is the model's own, gone by scores."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from plphp.errors import SpanError
from plphp.families.base import Features, Inputs
from plphp.families.towers import StandIn, VisionTower
from plphp.kernels.precision import as_written

from .copies import Change, copied_with
from .stand_ins import Function, average, computing, empty, scores_of_patches


def of_tokens(
    core: PreTrainedModel, tower: VisionTower, features: Features, inputs: Inputs, patch_scores: Tensor
) -> Tensor:
    """Scores of the tokens that an input of images or videos becomes, float32 [tokens]."""
    total = _sent(core, tower, features, inputs, patch_scores)
    # Patches that are padding, and factors that models put on their features, count here as they do above.
    weight = _sent(core, tower, features, inputs, torch.ones_like(patch_scores))
    return torch.where(weight > 0, total / weight, torch.inf)


class _Arrived(Exception):  # noqa: N818  # no error, but the end of a run
    """Ends a run behind the stand-in that has the scores of all tokens."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


@torch.no_grad()
def _sent(
    core: PreTrainedModel, tower: VisionTower, features: Features, inputs: Inputs, patch_scores: Tensor
) -> Tensor:
    """Send numbers the way of the features of patches, float32 [tokens]."""
    changes = {path: _stood_in(name, core, path == tower.tokens) for path, name in tower.stand_ins.items()}
    shadow = copied_with(core, {**changes, str(tower.patches): scores_of_patches(patch_scores)})
    method = shadow.get_video_features if features.of_videos else shadow.get_image_features
    try:
        with as_written(patch_scores.device):
            output = method(inputs[features.pixels[0]], **feature_arguments(method, core.config, inputs))
    except _Arrived as arrived:
        return arrived.scores.reshape(-1)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise SpanError(
            f"Scores of the shape {tuple(patch_scores.shape)} do not fit {features.pixels[0]}: pass the inputs with "
            "which the tower was recorded."
        ) from error
    tokens = output.pooler_output
    return torch.cat([part[..., 0].reshape(-1) for part in ([tokens] if isinstance(tokens, Tensor) else tokens)])


def feature_arguments(method: Callable[..., Any], config: PretrainedConfig, inputs: Inputs) -> dict[str, Any]:
    """What a method takes of the inputs, beside the pixels, which come first; the rest as the model sets it."""
    arguments = {}
    for name, parameter in list(inspect.signature(method).parameters.items())[1:]:
        if inputs.get(name) is not None:
            arguments[name] = inputs[name]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments[name] = getattr(config, name, getattr(config.vision_config, name, None))
    return arguments


def _stood_in(name: StandIn, core: PreTrainedModel, last: bool) -> Change:
    """Return what makes the stand-in of this name."""
    config = core.config
    width = config.get_text_config(decoder=True).hidden_size
    merged = getattr(config.vision_config, "spatial_merge_size", 1) ** 2
    functions: dict[StandIn, Function] = {
        "same": lambda module, values: values,
        "mean": partial(_mean, width),
        "average": average,
        "merged": lambda module, values: _mean(width, module, values.view(-1, merged)),
        "one": lambda module, values: torch.ones_like(values),
        "zero": lambda module, values: torch.zeros_like(values),
        "empty": empty,
    }
    function = functions[name]

    def arrive(module: nn.Module, values: Tensor) -> Tensor:
        raise _Arrived(function(module, values)[..., 0])

    def change(part: Any) -> Any:
        if isinstance(part, nn.ModuleList):
            return nn.ModuleList([change(module) for module in part])
        if isinstance(part, nn.Module):
            return computing(arrive if last else function)(part)
        weights = torch.zeros if name == "zero" else torch.ones
        # A matrix of weights is given a single channel, of which the mean over the channels is the channel.
        return weights((1, *part.shape[1:]) if name == "mean" else part.shape, dtype=torch.float32, device=part.device)

    return change


def _mean(width: int, module: Any, values: Tensor) -> Tensor:
    """The mean over the channels, in as many channels as the module returns, or the text model reads."""
    channels = getattr(module, "out_features", width)
    return values.mean(-1, keepdim=True).expand(*values.shape[:-1], channels)
