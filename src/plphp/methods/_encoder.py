# SPDX-License-Identifier: Apache-2.0
"""What methods of the encoder stage have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.policy.allocation import kept_count
from plphp.policy.image_tokens import ImageTokens
from plphp.settings.config import PLPHPConfig

from ._unused import OF_HEADS, refuse_unused

if TYPE_CHECKING:
    from torch import Tensor


def staying(image: ImageTokens, config: PLPHPConfig) -> int:
    """How many vision tokens of an image stay, at least one."""
    return max(1, kept_count(config.base_rate, len(image.features), config.min_kept))


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse settings of layers, heads and queries, which have no meaning before the text model."""
    refuse_unused(config, ("image_quota",), "works on each image by itself in any case")
    of_scores = ("exempt_layers", "query_rows", "gqa_reduction", "score_pool")
    reason = "lets tokens leave before the text model, where there are no layers, heads and queries"
    refuse_unused(config, (*of_scores, *OF_HEADS), reason)


def of_patches(score: Tensor) -> Tensor:
    """Scores with a finite number, above all others, in the place of inf: what no patch stands behind stays first."""
    finite = score.isfinite()
    if bool(finite.all()):
        return score
    top = score[finite].max() if bool(finite.any()) else score.new_zeros(())
    return score.where(finite, 2 * top.abs() + 1)
