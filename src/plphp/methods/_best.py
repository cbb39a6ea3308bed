# SPDX-License-Identifier: Apache-2.0
"""What methods share that ask with several queries: how what each of them looks at becomes a score of an entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plphp.policy.evidence import LayerScores
from plphp.policy.rankers import by_best_position, by_peak, per_head, times_value_norm
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

if TYPE_CHECKING:
    from torch import Tensor

RANKERS = {"peak": by_peak, "mean": per_head, "best_rank": by_best_position}
"""By the option ``reduce``: the largest attention of any query, the mean, or the best position for any of them."""
OPTIONS = {
    "reduce": Option("best_rank", choices=tuple(RANKERS)),
    "value_norm": Option(1, low=0, high=1),
}


def asked(config: PLPHPConfig) -> dict[str, Any]:
    """The fields of `plphp.policy.evidence.Evidence` that `score` needs."""
    options = settings(OPTIONS, config.options)
    return {
        "peak": options["reduce"] == "peak",
        "best_position": options["reduce"] == "best_rank",
        "value_norm": options["value_norm"] == 1,
    }


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """A score by the option ``reduce``, times the norms of the values with ``value_norm=1``.

    Returns
    -------
    Tensor
        float32 [batch, kv_heads, seq].
    """
    return times_value_norm(RANKERS[settings(OPTIONS, config.options)["reduce"]](scores, config), scores)
