# SPDX-License-Identifier: Apache-2.0
"""The ceiling: vision tokens ranked by the queries of the answer itself, which no method can have beforehand.

The query rows are those of the answer tokens that read the pruned cache, all but the last one. ``reduce`` combines
them for each KV head: the largest attention (``peak``), the mean, or the best position (``best_rank``, see
`plphp.methods.recall_rank`). Only `plphp.branch` with ``answer_ids`` has an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.policy.allocation import uniform
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import settings

from . import _best
from ._unused import refusing

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {"reduce": _best.OPTIONS["reduce"]}


def evidence(config: PLPHPConfig) -> Evidence:
    """What the option ``reduce`` looks at."""
    reduce = settings(OPTIONS, config.options)["reduce"]
    return Evidence(peak=reduce == "peak", best_position=reduce == "best_rank")


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """By the option ``reduce``."""
    return _best.RANKERS[settings(OPTIONS, config.options)["reduce"]](scores, config)


METHOD = Method(
    name="oracle",
    summary="ranked by the answer's own queries: the ceiling, for plphp.branch only",
    paper="control",
    kv=KVStage(
        allocate=uniform,
        score=score,
        evidence=evidence,
        needs_answer=True,
    ),
    options=OPTIONS,
    check=refusing(("query_rows",), "asks with the queries of the answer"),
    when="as the ceiling, in plphp.branch and plphp eval",
)
