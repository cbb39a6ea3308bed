# SPDX-License-Identifier: Apache-2.0
"""PLPHP without its layer level: the same retention rate in every layer, per-head choice."""

from plphp.policy.allocation import uniform
from plphp.policy.method import Method
from plphp.policy.rankers import per_head
from plphp.policy.stages import KVStage

METHOD = Method(
    name="uniform",
    summary="the same retention rate in every layer, every KV head keeps its own tokens",
    paper="control: arXiv:2502.14504 without the layer level",
    kv=KVStage(allocate=uniform, score=per_head),
    when="as plphp's ablation without the layer level",
)
