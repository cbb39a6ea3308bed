# SPDX-License-Identifier: Apache-2.0
"""Where a model has its vision tower, and the layers of the tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.families.base import Family
from plphp.families.towers import VisionTower


def known_tower(family: Family) -> VisionTower:
    """Return what is known of the vision tower of a family.

    Raises
    ------
    UnsupportedFeatureError
        If there is nothing.
    """
    if family.tower is None:
        raise UnsupportedFeatureError(
            f"plphp does not know the vision tower of the family {family.name!r}, whose attention this method reads: "
            "give the Family a VisionTower (docs/extending.md), or choose a method without it."
        )
    return family.tower


def core_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that has the tower and ``get_image_features``: the model, or the base model inside of it."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "get_image_features") else model


def part_of(model: PreTrainedModel, path: str) -> nn.Module:
    """Return the module at a path of `VisionTower`.

    Raises
    ------
    UnsupportedFeatureError
        If the model has no module there.
    """
    try:
        return core_of(model).get_submodule(path)
    except AttributeError as error:
        raise UnsupportedFeatureError(
            f"{type(model).__name__} has no module {path!r}, where its family has the vision tower: use a version of "
            "transformers that plphp supports and a tower that is not wrapped, or register a Family with another tower."
        ) from error


def chosen_layers(
    model: PreTrainedModel, tower: VisionTower, module: nn.Module, layers: Sequence[int] | slice
) -> list[nn.Module]:
    """Return the attention modules of some layers of a tower, counted over those with full attention.

    A slice takes what there is of it, one layer at least.

    Raises
    ------
    ConfigError
        If there is no such layer, or none is named.
    """
    found = [part for part in module.modules() if type(part).__name__.endswith("Attention") and hasattr(part, "config")]
    full = found if tower.full_attention is None else [found[i] for i in tower.full_attention(model.config)]
    first = layers.start if isinstance(layers, slice) else None
    if isinstance(layers, slice):
        layers = range(*layers.indices(len(full)))
    missing = [layer for layer in layers if not -len(full) <= layer < len(full)]
    if missing or not layers:
        asked = f"layers {list(layers)}" if layers else "no layers" if first is None else f"layers from {first} on"
        raise ConfigError(
            f"The method reads {asked} of the vision tower, and that of {type(model).__name__} has {len(full)} with "
            f"full attention, from {-len(full)} to {len(full) - 1}: set the option of the method that names them."
        )
    return [full[layer] for layer in layers]
