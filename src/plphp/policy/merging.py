# SPDX-License-Identifier: Apache-2.0
"""Vision tokens of an image that stay with the features of others merged into theirs. Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.kernels.precision import as_written
from plphp.settings.checks import check_int

from .cosine import unit
from .distances import AT_ONCE
from .token_checks import check_features, check_grid, check_scores
from .top_tokens import top


def visionzip(features: Tensor, keys: Tensor, scores: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Keep tokens that the class token attends to, and merge the rest into a few more (VisionZip, arXiv:2412.04467).

    *Dominant* tokens have the highest scores and keep their features. Of the n others *contextual* tokens are taken
    evenly, number ``floor(i * n / contextual)`` as the i-th from 0. Each token that is left is assigned to the
    contextual token whose key is the most similar by cosine, the first of equal ones, and a contextual token gets its
    own features plus the mean of those that are assigned to it (as in the authors' code: a sum, not a mean of all).

    Parameters
    ----------
    features : Tensor
        float [tokens, dim]; those of one image. The paper takes them from the vision tower, before the projector.
    keys : Tensor
        float [tokens, key_dim]: what is compared, in the paper the keys of the tower's layer that gives the scores; the
        features themselves where there are none.
    scores : Tensor
        float [tokens], higher is better; in the paper the attention of the class token.
    dominant, contextual : int
        How many there are of each; together from 1 to ``tokens``.

    Returns
    -------
    kept : Tensor
        bool [tokens]: dominant and contextual tokens.
    merged : Tensor
        [dominant + contextual, dim], in the order and the dtype of the tokens: the features of what is kept.

    Raises
    ------
    ConfigError
        If a shape is wrong, or a number of tokens out of range.
    NonFiniteAttentionError
        If features, keys or scores hold NaN or inf.
    """
    check_features("features", features)
    check_features("keys", keys)
    tokens = len(features)
    if len(keys) != tokens:
        raise ConfigError(f"keys must be those of the {tokens} vision tokens of the image, got {len(keys)}.")
    check_scores("scores", scores, tokens)
    _check_numbers(dominant, contextual, tokens)
    kept = top(scores, dominant) if dominant else torch.zeros_like(scores, dtype=torch.bool)
    merged = features
    if contextual:
        others = (~kept).nonzero()[:, 0]
        index = torch.arange(contextual, device=others.device) * len(others) // contextual
        targets = others[index]
        kept[targets] = True
        left = (~kept).nonzero()[:, 0]
        means = _means(features[left], _nearest(keys, left, targets), contextual)
        merged = features.index_copy(0, targets, (features[targets] + means).to(features.dtype))
    return kept, merged[kept]


def pool(features: Tensor, grid: tuple[int, int], keep_share: float) -> tuple[Tensor, Tensor]:
    """Average the features over cells of the image: the control for every method that chooses tokens.

    The cells are as square as the grid allows, each token is in exactly one, and where the grid cannot be cut evenly
    their sides differ by one. Each is one token: the one in its middle, the upper and the left one of two, stays in its
    place and gets the mean of the cell. As many remain as cells that make ``keep_share`` of the tokens about.

    Parameters
    ----------
    features : Tensor
        float [tokens, dim]; those of one image, row by row.
    grid : tuple of int
        Rows and columns of the image.
    keep_share : float
        Fraction of the tokens that remains, above 0 and at most 1.

    Returns
    -------
    kept : Tensor
        bool [tokens].
    pooled : Tensor
        [kept, dim], in the order and the dtype of the tokens.

    Raises
    ------
    ConfigError
        If a shape is wrong, the grid does not hold the tokens, or the share is out of range.
    NonFiniteAttentionError
        If the features hold NaN or inf.
    """
    check_features("features", features)
    check_grid(grid, len(features))
    if isinstance(keep_share, bool) or not isinstance(keep_share, (int, float)) or not 0 < keep_share <= 1:
        raise ConfigError(f"keep_share must be a number above 0 and at most 1, got {keep_share!r}.")
    (row_cell, rows), (column_cell, columns) = (
        _cut(side, cells, features.device) for side, cells in zip(grid, _cells(grid, keep_share), strict=True)
    )
    kept = torch.zeros(grid, dtype=torch.bool, device=features.device)
    kept[rows[:, None], columns] = True
    cell = (row_cell[:, None] * len(columns) + column_cell).flatten()
    return kept.flatten(), _means(features, cell, len(rows) * len(columns)).to(features.dtype)


def _check_numbers(dominant: int, contextual: int, tokens: int) -> None:
    check_int("dominant", dominant, minimum=0)
    check_int("contextual", contextual, minimum=0)
    if not 1 <= dominant + contextual <= tokens:
        raise ConfigError(
            f"dominant + contextual must be from 1 to the {tokens} vision tokens of the image, got {dominant} + "
            f"{contextual}."
        )


def _nearest(keys: Tensor, left: Tensor, targets: Tensor) -> Tensor:
    """For each of some tokens the target with the most similar key, as int64 [left] of numbers of targets."""
    with as_written(keys.device):
        vectors = unit(keys)
        of_targets = vectors[targets].T
        pieces = left.split(max(1, AT_ONCE // len(targets)))
        return torch.cat([(vectors[piece] @ of_targets).argmax(1) for piece in pieces])


def _means(features: Tensor, group: Tensor, groups: int) -> Tensor:
    """Means of the features [tokens, dim] of each group, float64 [groups, dim]; zeros for a group of none."""
    # In float64, so that the order in which a GPU adds decides nothing.
    sums = features.new_zeros(groups, features.shape[1], dtype=torch.float64).index_add(0, group, features.double())
    counts = torch.bincount(group, minlength=groups)[:, None]
    return sums / counts.clamp(min=1)


def _cells(grid: tuple[int, int], share: float) -> tuple[int, int]:
    """Rows and columns of cells: of those that are square, but for rounding, the ones that meet the share best."""
    target = share * grid[0] * grid[1]
    choices = []
    for side in (0, 1):
        exact = grid[side] * math.sqrt(share)
        for number in (math.floor(exact), math.ceil(exact)):
            cells = [max(1, number)] * 2
            cells[1 - side] = min(grid[1 - side], max(1, round(target / cells[side])))
            choices.append((cells[0], cells[1]))

    def badness(cells: tuple[int, int]) -> float:
        # The number counts for more than the shape, which no short side of an image can have in full.
        missed = math.log(cells[0] * cells[1] / target)
        return 6 * abs(missed) + abs(math.log(cells[0] / grid[0] * grid[1] / cells[1]))

    return min(choices, key=badness)


def _cut(side: int, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut a side into cells: for each place the number of its cell, and for each cell the place in its middle."""
    ends = torch.arange(cells + 1, device=device) * side // cells
    number = torch.repeat_interleave(torch.arange(cells, device=device), ends.diff(), output_size=side)
    return number, (ends[:-1] + ends[1:] - 1) // 2
