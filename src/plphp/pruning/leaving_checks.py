# SPDX-License-Identifier: Apache-2.0
"""Whether what methods of the encoder and the prefill stage give can be: a method may be a user's own."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.families.spans import Grid
from plphp.policy.image_tokens import Chosen, ImageTokens


def check_rate(method: str, rate: object) -> None:
    """Raise `ConfigError` unless a retention rate is a number from 0 to 1."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise ConfigError(f"The method {method!r} gave the retention rate {rate!r}: it has to be a number from 0 to 1.")


def check_layer(method: str, layer: object, layers: int) -> None:
    """Raise `ConfigError` unless tokens can leave before a layer."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= layers:
        raise ConfigError(
            f"The method {method!r} lets tokens leave from layer {layer} on, which must be between 1 and {layers}."
        )


def check_grid(method: str, grid: Grid, tokens: int, row: int, number: int) -> None:
    """Raise `ConfigError` unless the tokens of an image form a plain grid."""
    if grid is None:
        raise ConfigError(
            f"The method {method!r} works on rows and columns of tokens, and image {number} of row {row} has no plain "
            f"grid ({tokens} tokens): take a method that needs none, such as 'divprune'."
        )


def check_mask(method: str, mask: object, shape: tuple[int, ...]) -> None:
    """Raise `ConfigError` unless the tokens that stay are marked in a mask of a shape."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or tuple(mask.shape) != shape:
        raise ConfigError(f"The method {method!r} has to give a mask, bool {list(shape)}, got {_described(mask)}.")


def check_chosen(method: str, chosen: object, image: ImageTokens) -> None:
    """Raise `ConfigError` unless a choice is one of the tokens of an image, with finite features where it merges."""
    if not isinstance(chosen, Chosen):
        raise ConfigError(f"The method {method!r} has to give a Chosen for each image, got {_described(chosen)}.")
    check_mask(method, chosen.stay, (len(image.features),))
    if chosen.features is None:
        return
    expected = [int(chosen.stay.sum()), image.features.shape[1]]
    if not isinstance(chosen.features, Tensor) or list(chosen.features.shape) != expected:
        raise ConfigError(
            f"The method {method!r} has to give features {expected} for the tokens that stay, got "
            f"{_described(chosen.features)}."
        )
    if not bool(chosen.features.isfinite().all()):
        raise ConfigError(f"The method {method!r} gave features with NaN or inf, from an image without them.")


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
