# SPDX-License-Identifier: Apache-2.0
"""Keep everything: the same cache and attention function with nothing evicted."""

from plphp.policy import fading_scores
from plphp.policy.allocation import keep_all
from plphp.policy.method import Method
from plphp.policy.rankers import per_head
from plphp.policy.stages import KVStage

METHOD = Method(
    name="none",
    summary="keep every vision token",
    paper="control",
    kv=KVStage(allocate=keep_all, score=per_head, evidence=fading_scores.evidence, fading_score=fading_scores.score),
    when="to see what plphp itself changes: nothing",
)
