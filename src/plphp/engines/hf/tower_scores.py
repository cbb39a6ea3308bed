# SPDX-License-Identifier: Apache-2.0
"""From scores of the patches of a vision tower to scores of the vision tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from plphp.errors import SpanError, UnsupportedFeatureError
from plphp.families.base import Family, Features, Inputs
from plphp.families.registry import family_of
from plphp.families.spans import VisionSpans, find_spans
from plphp.families.towers import VisionTower

from .patch_ways import of_tokens
from .tower_layers import core_of, known_tower, part_of
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
    part_of(model, tower.patches)
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
        values = of_tokens(core_of(model), tower, features, inputs, of_patches.float())
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
