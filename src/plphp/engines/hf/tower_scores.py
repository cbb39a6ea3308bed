# SPDX-License-Identifier: Apache-2.0
"""From scores of the patches of a vision tower to scores of the vision tokens of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel

from plphp.errors import SpanError, UnsupportedFeatureError
from plphp.families.base import Family, Features, Inputs
from plphp.families.registry import family_of
from plphp.families.spans import VisionSpans, find_spans
from plphp.families.towers import StandIn, VisionTower

from .stand_ins import Change, Function, average, computing, copied_with, empty, scores_of_patches
from .tower_recording import core_of, known_tower
from .unwrapping import unwrapped


def token_scores(
    model: Any, inputs: Inputs, patch_scores: Sequence[Tensor], *, past_length: int = 0
) -> tuple[tuple[Tensor, ...], ...]:
    """Carry scores of patches to the vision tokens that the patches become: the mean of those behind each token.

    The model's own way from patches to tokens is gone with scores in the place of features
    (`plphp.families.towers.VisionTower`); the tower does not run again. A token that interpolation makes of several
    patches has their mean by its weights.

    Parameters
    ----------
    model : PreTrainedModel
        The model that read the patches, or a wrapper around one.
    inputs : mapping
        What the model was called with: ``input_ids``, ``attention_mask`` and the inputs of images and videos.
    patch_scores : sequence of Tensor
        For each pass of the tower finite floats [images, positions], in the layout of `TowerPass`: the images of the
        prompt first, its videos second. The score of a class token is read only where that is a token of the prompt.
    past_length : int
        Tokens that the cache held before this prompt.

    Returns
    -------
    tuple of tuple of Tensor
        For each row of the batch and each of its segments, as `VisionSpans.segment` numbers them (an image, a tile or
        a frame, see docs/families.md), float32 [tokens]: scores in the order in which the tokens stand in the prompt.
        ``inf`` for a token that no patch stands behind, such as a newline token, so that it is kept.

    Raises
    ------
    UnsupportedFeatureError
        If no patch stands behind the tokens of this family (Idefics2), or nothing is known of its tower.
    SpanError
        If the scores are not those of the images in the inputs.
    """
    model = unwrapped(model)
    family = family_of(model.config)
    tower = known_tower(family)
    if tower.patches is None:
        raise UnsupportedFeatureError(
            f"In models of the family {family.name!r} a resampler mixes all patches of an image into every token, so "
            "that scores of patches say nothing of tokens: choose a method that does not read the vision tower."
        )
    spans = find_spans(family, model.config, inputs, past_length=past_length)
    scores = _in_prompt(model, family, tower, inputs, patch_scores, spans)
    rows = zip(scores, spans.segment.to(scores.device), spans.grids, strict=True)
    return tuple(tuple(row[numbers == image] for image in range(len(grids))) for row, numbers, grids in rows)


def _in_prompt(
    model: PreTrainedModel,
    family: Family,
    tower: VisionTower,
    inputs: Inputs,
    patch_scores: Sequence[Tensor],
    spans: VisionSpans,
) -> Tensor:
    """Put the scores of all tokens where they stand, float32 [batch, seq]."""
    present = [features for features in family.features if inputs.get(features.pixels[0]) is not None]
    if len(present) != len(patch_scores) or not present:
        raise SpanError(
            f"Expected scores of {len(present)} passes of the vision tower, for {_named(present)}, got "
            f"{len(patch_scores)}: pass the inputs with which the tower was recorded, and a tensor for each pass."
        )
    placed = torch.full(spans.segment.shape, torch.nan, dtype=torch.float32, device=patch_scores[0].device)
    for features, of_patches in zip(present, patch_scores, strict=True):
        values = _of_tokens(core_of(model), tower, features, inputs, of_patches.float())
        places = _placeholders(features, model, inputs, spans)
        tokens = int(places.sum())
        if features.of_videos and tower.behind_video and len(values) < tokens:
            of_videos = values.view(len(inputs[features.pixels[0]]), -1)
            values = pad(of_videos, (0, tower.behind_video), value=torch.inf).flatten()
        if len(values) != tokens:
            raise SpanError(
                f"The prompt holds {tokens} vision tokens for {_named([features])}, but the patches fill "
                f"{len(values)}: pass the inputs with which the tower was recorded."
            )
        placed[places.to(placed.device)] = values.to(placed)
    return placed


def _named(present: Sequence[Features]) -> str:
    return " and ".join(features.pixels[0] for features in present) or "no images"


def _placeholders(features: Features, model: PreTrainedModel, inputs: Inputs, spans: VisionSpans) -> Tensor:
    """Mark what the features fill, bool [batch, seq] over the whole conversation."""
    places = features.placeholders(model.config, inputs)
    places = pad(places, (spans.end - places.shape[1], 0))  # a later turn may pass its new tokens alone
    places[:, : spans.start] = False
    return places


def _of_tokens(
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
        output = method(inputs[features.pixels[0]], **_arguments(method, core.config, inputs))
    except _Arrived as arrived:
        return arrived.scores.reshape(-1)
    except (RuntimeError, ValueError, IndexError) as error:
        raise SpanError(
            f"Scores of the shape {tuple(patch_scores.shape)} do not fit {_named([features])}: pass the inputs with "
            "which the tower was recorded."
        ) from error
    tokens = output.pooler_output
    return torch.cat([part[..., 0].reshape(-1) for part in ([tokens] if isinstance(tokens, Tensor) else tokens)])


def _arguments(method: Callable[..., Any], config: PretrainedConfig, inputs: Inputs) -> dict[str, Any]:
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
