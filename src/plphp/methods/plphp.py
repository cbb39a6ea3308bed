# SPDX-License-Identifier: Apache-2.0
"""PLPHP (arXiv:2502.14504): layer-level retention rate allocation and head-level vision token pruning."""

from plphp.policy.allocation import by_vision_attention
from plphp.policy.method import Method
from plphp.policy.rankers import per_head
from plphp.policy.stages import KVStage

METHOD = Method(
    name="plphp",
    summary="layers that attend more to the image keep more of it, every KV head keeps its own tokens",
    paper="arXiv:2502.14504",
    kv=KVStage(
        allocate=by_vision_attention,
        score=per_head,
        uses_class_rule=lambda config: True,
        at_most=by_vision_attention,
    ),
    when="to reproduce the paper",
)
