# SPDX-License-Identifier: Apache-2.0
"""Vision tokens of an image with the highest scores, such as the attention that they receive in the vision tower."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.kernels.ordering import falling_order, positions_in_order

from .token_checks import check_grid, check_keep, check_scores


def top(scores: Tensor, keep: int) -> Tensor:
    """Keep the tokens with the highest scores; of equal ones the earlier.

    Parameters
    ----------
    scores : Tensor
        float [tokens], higher is better.
    keep : int
        Tokens that stay, from 1 to ``tokens``.

    Returns
    -------
    Tensor
        bool [tokens], on the same device.

    Raises
    ------
    ConfigError
        If the scores are not [tokens], or ``keep`` is out of range.
    NonFiniteAttentionError
        If the scores hold NaN or inf.
    """
    check_scores("scores", scores)
    check_keep(keep, len(scores))
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    kept[falling_order(scores.detach())[:keep]] = True
    return kept


def top_rows(scores: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
    """Keep whole rows of the image, those with the largest sums of scores (FoPru, arXiv:2411.14164).

    Of equal rows the upper one is taken. The last row that is taken gives its highest scores alone, where all of it
    would be more than ``keep``; this part is ours, since the paper's numbers of tokens are whole rows.

    Parameters
    ----------
    scores : Tensor
        float [tokens], higher is better, row by row.
    grid : tuple of int
        Rows and columns of the image.
    keep : int
        Tokens that stay, from 1 to ``tokens``.

    Returns
    -------
    Tensor
        bool [tokens], on the same device.

    Raises
    ------
    ConfigError
        If the scores are not [tokens], the grid does not hold them, or ``keep`` is out of range.
    NonFiniteAttentionError
        If the scores hold NaN or inf.
    """
    check_scores("scores", scores)
    check_grid(grid, len(scores))
    check_keep(keep, len(scores))
    cells = _precise(scores).view(grid)
    whole, rest = divmod(keep, grid[1])
    rows = falling_order(cells.sum(1))
    kept = torch.zeros(grid, dtype=torch.bool, device=scores.device)
    kept[rows[:whole]] = True
    if rest:
        cut = int(rows[whole])
        kept[cut] = positions_in_order(cells[cut][None])[0] < rest
    return kept.flatten()


def top_over_layers(scores: Tensor, keep: int) -> Tensor:
    """Keep the tokens with the highest sums of scores over layers of the vision tower (VTC-CLS, arXiv:2412.05819).

    Parameters
    ----------
    scores : Tensor
        float [layers, tokens], higher is better.
    keep : int
        Tokens that stay, from 1 to ``tokens``; of equal sums the earlier.

    Returns
    -------
    Tensor
        bool [tokens], on the same device.

    Raises
    ------
    ConfigError
        If the scores are not [layers, tokens], or ``keep`` is out of range.
    NonFiniteAttentionError
        If the scores hold NaN or inf.
    """
    if scores.ndim != 2 or len(scores) == 0:
        raise ConfigError(
            f"scores must be [layers, tokens] with one layer or more, got {list(scores.shape)}: `top` is for the "
            "scores of a single layer."
        )
    return top(_precise(scores).sum(0), keep)


def _precise(scores: Tensor) -> Tensor:
    """In float32 at least: a sum of bfloat16 has 8 bits, and many scores would be equal."""
    return scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
