# SPDX-License-Identifier: Apache-2.0
"""SnapKV (arXiv:2404.14469), as published: text is evicted like anything else.

The queries of an observation window, the last ``window`` prompt tokens, vote for the entries before it: with A their
softmax attention, ``s_g[j] = pool(mean_window(A_g))[j]``, where ``pool`` is a 1-D pooling of width ``kernel`` along
the sequence. Each KV head keeps the best of s_g; the window is always kept.

Defaults: window 16, kernel 5, average pooling (``pool="max"`` is the other form that is in use).

Changed for comparison: each layer and head keeps as many entries as a method that keeps all text and
``retention_rate`` of the vision tokens, so that both hold equal memory. Query heads of a KV head are combined with
``gqa_reduction``; the paper's models have one each.
"""

import dataclasses

from plphp.policy.allocation import uniform
from plphp.policy.evidence import Evidence
from plphp.policy.method import Method
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig

from ._window import OPTIONS, by_window, check, window_evidence


def evidence(config: PLPHPConfig) -> Evidence:
    """The window's rows, with all of the prompt before them as candidates."""
    return dataclasses.replace(window_evidence(config), candidates="prompt")


KV = KVStage(allocate=uniform, score=by_window, evidence=evidence)

METHOD = Method(
    name="snapkv",
    summary="text and vision tokens before an observation window compete, by its pooled attention",
    paper="arXiv:2404.14469",
    kv=KV,
    options=OPTIONS,
    check=check,
)
