# SPDX-License-Identifier: Apache-2.0
"""Checks of what choosing the vision tokens of an image is given; each says what was given and what was expected."""

from __future__ import annotations

from torch import Tensor

from plphp.errors import ConfigError, NonFiniteAttentionError


def check_features(name: str, features: Tensor) -> None:
    """Raise unless a tensor is floating [tokens, dim], with a token and a dimension at least, and finite.

    Raises
    ------
    ConfigError
        If it has another shape or dtype.
    NonFiniteAttentionError
        If it holds NaN or inf.
    """
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ConfigError(
            f"{name} must be a floating tensor [tokens, dim] with one token or more, got {_described(features)}: "
            "give those of one image at a time."
        )
    _check_finite(name, features)


def check_scores(name: str, scores: Tensor, tokens: int | None = None) -> None:
    """Raise unless a tensor is floating [tokens] and finite.

    Parameters
    ----------
    name : str
        For the message.
    scores : Tensor
        What is checked.
    tokens : int, optional
        How many there have to be. Default: one or more.

    Raises
    ------
    ConfigError
        If it has another shape or dtype.
    NonFiniteAttentionError
        If it holds NaN or inf.
    """
    wrong = scores.ndim != 1 or len(scores) == 0 if tokens is None else tuple(scores.shape) != (tokens,)
    if wrong or not scores.is_floating_point():
        expected = "tokens" if tokens is None else tokens
        raise ConfigError(f"{name} must be a floating tensor [{expected}], got {_described(scores)}.")
    _check_finite(name, scores)


def check_keep(keep: object, tokens: int) -> None:
    """Raise `ConfigError` unless a number of tokens to keep is an integer from 1 to ``tokens``."""
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= tokens:
        raise ConfigError(
            f"keep must be an integer from 1 to the {tokens} vision tokens of the image, got {keep!r}: "
            "kept_count(rate, tokens, 1) gives one."
        )


def check_grid(grid: tuple[int, int], tokens: int) -> None:
    """Raise `ConfigError` unless a grid is (rows, columns) of at least 1 that hold ``tokens``."""
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != tokens:
        raise ConfigError(
            f"grid must be the (rows, columns) of the {tokens} vision tokens of the image, got {tuple(grid)}."
        )


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        what = "NaN" if bool(values.isnan().any()) else "inf"
        raise NonFiniteAttentionError(
            f"{name} holds {what}, so that no vision token can be preferred: look at how the image was loaded, or keep "
            "all of its tokens."
        )


def _described(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
