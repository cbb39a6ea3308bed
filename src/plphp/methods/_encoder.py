# SPDX-License-Identifier: Apache-2.0
"""What methods of the encoder stage have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.allocation import kept_count
from plphp.policy.image_tokens import ImageTokens
from plphp.settings.config import PLPHPConfig

if TYPE_CHECKING:
    from torch import Tensor


def staying(image: ImageTokens, config: PLPHPConfig) -> int:
    """How many vision tokens of an image stay, at least one."""
    return max(1, kept_count(config.base_rate, len(image.features), config.min_kept))


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse settings of the KV stage, which have no meaning before the text model."""
    for name in ("exempt_layers", "query_rows"):
        if getattr(config, name):
            raise ConfigError(
                f"{config.method} lets tokens leave before the text model, where there are no layers and no queries: "
                f"leave out {name}, got {getattr(config, name)!r}."
            )


def of_patches(score: Tensor) -> Tensor:
    """Scores with a finite number, above all others, in the place of inf: what no patch stands behind stays first."""
    finite = score.isfinite()
    if bool(finite.all()):
        return score
    top = score[finite].max() if bool(finite.any()) else score.new_zeros(())
    return score.where(finite, 2 * top.abs() + 1)
