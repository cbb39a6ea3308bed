# SPDX-License-Identifier: Apache-2.0
"""SnapKV's ranking (arXiv:2404.14469) for the vision tokens alone: all text is kept.

The formula is that of `plphp.methods.snapkv`; text still takes part in the pooling, and only vision tokens are
evicted. Vision tokens inside the window come first.
"""

from plphp.policy.allocation import uniform
from plphp.policy.method import Method
from plphp.policy.stages import KVStage

from ._window import OPTIONS, by_window, check, window_evidence

METHOD = Method(
    name="snapkv_vision",
    summary="vision tokens by the pooled attention of an observation window, all text kept",
    paper="arXiv:2404.14469, restricted to vision tokens",
    kv=KVStage(
        allocate=uniform,
        score=by_window,
        evidence=window_evidence,
    ),
    options=OPTIONS,
    check=check,
)
