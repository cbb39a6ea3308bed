# SPDX-License-Identifier: Apache-2.0
"""Random vision tokens per layer and head: what any method has to beat."""

from plphp.policy.allocation import uniform
from plphp.policy.method import Method
from plphp.policy.rankers import at_random
from plphp.policy.stages import KVStage

from ._unused import refusing

METHOD = Method(
    name="random",
    summary="random vision tokens per layer and KV head, the same rate in every layer",
    paper="control",
    kv=KVStage(allocate=uniform, score=at_random, heads_compare=False),
    check=refusing(("query_rows", "gqa_reduction"), "draws what stays, whatever any query attends to"),
    when="as the control that a method has to beat",
)
