# SPDX-License-Identifier: Apache-2.0
"""PLPHP without its head level: layer rates, and one choice for all heads of a layer."""

from plphp.policy.allocation import by_vision_attention
from plphp.policy.method import Method
from plphp.policy.rankers import shared_by_heads
from plphp.policy.stages import KVStage

from ._unused import refusing

METHOD = Method(
    name="shared",
    summary="layers that attend more to the image keep more of it, all heads keep the same tokens",
    paper="control: arXiv:2502.14504 without the head level",
    kv=KVStage(
        allocate=by_vision_attention,
        score=shared_by_heads,
        uses_class_rule=lambda config: True,
        at_most=by_vision_attention,
        heads_compare=False,
    ),
    check=refusing(("gqa_reduction",), "ranks by the mean over all query heads"),
    when="as plphp's ablation without the head level",
)
