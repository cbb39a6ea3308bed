# SPDX-License-Identifier: Apache-2.0
"""Rank by the L2 norm of the values alone: a control for methods that weight their evidence with it.

Models that normalise their values (Gemma 4) give all tokens the same norm, so that the ranking means nothing there.
"""

from plphp.policy.allocation import uniform
from plphp.policy.evidence import Evidence
from plphp.policy.method import Method
from plphp.policy.rankers import by_value_norm
from plphp.policy.stages import KVStage

from ._unused import refusing

METHOD = Method(
    name="value_norm",
    summary="the vision tokens with the largest values, without a look at attention",
    paper="control",
    kv=KVStage(
        allocate=uniform,
        score=by_value_norm,
        evidence=lambda config: Evidence(value_norm=True),
    ),
    check=refusing(("query_rows", "gqa_reduction"), "ranks by the values, whatever any query attends to"),
)
