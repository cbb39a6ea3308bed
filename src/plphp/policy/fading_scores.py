# SPDX-License-Identifier: Apache-2.0
"""Scores by which entries fade under methods whose own say nothing of entries: those that keep all of them alike.

They ask with the prompt's own queries, turned to behind it, as the method ``prompt_queries`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.settings.config import PLPHPConfig

from .evidence import Evidence, LayerScores
from .rankers import by_best_position, times_value_norm

if TYPE_CHECKING:
    from torch import Tensor

ROWS, AHEAD = 128, 10
"""Queries that ask, and how many tokens behind the prompt they ask from."""


def evidence(config: PLPHPConfig) -> Evidence:
    """What `score` needs, under a budget; nothing without."""
    if config.vision_budget is None:
        return Evidence()
    return Evidence(turned_rows=ROWS, turned_ahead=AHEAD, best_position=True, value_norm=True)


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """The best position that any of the queries gives to an entry, times the norm of its value.

    Returns
    -------
    Tensor
        float32 [batch, kv_heads, seq].
    """
    return times_value_norm(by_best_position(scores, config), scores)
