# SPDX-License-Identifier: Apache-2.0
"""The stages at which vision tokens leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plphp.settings.config import PLPHPConfig

from .evidence import LayerScores

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PromptStage:
    """Vision tokens leave inside prefill: from a layer on no other token sees them, and their KV is not stored.

    Parameters
    ----------
    first : callable
        ``(config, layers) -> int``: the first decoder layer without them, from 1 to ``layers``.
    stays : callable
        ``(scores, config, layers) -> bool [batch, seq]``: the vision tokens that stay, from the scores of the layer
        before.
    """

    first: Callable[[PLPHPConfig, int], int]
    stays: Callable[[LayerScores, PLPHPConfig, int], Tensor]
