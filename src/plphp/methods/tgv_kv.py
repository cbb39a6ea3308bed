# SPDX-License-Identifier: Apache-2.0
"""TGV-KV (arXiv:2606.03075): the text that the later text attends to says which vision tokens count, and where.

With A the attention of a layer, averaged over all heads, and t = 1 ... T the text tokens behind the first image:

    w[t] = sum over q >= t of A[q, t] / (T - t + 1)            text-weighted ranking: the weight of a text token
    s[j] = sum over t of w[t] A[t, j]                          one score of vision token j for all heads
    rate[l] = r L a[l] / sum of a                              text-vision budgeting, over the L layers

where a[l] is the attention of these text tokens to the vision tokens, summed, and r the mean rate (``retention_rate``
or ``target_retention``). The first 4 tokens and the last of the prompt are always kept.

The authors' code (MIT) was read for what the formulas leave open. It has no settings but the budget.

Changed for comparison: the budget is one of the vision tokens, since all text is kept here; the paper's is one of the
whole cache, of which text goes last. What a layer would have above all of its vision tokens goes to the other layers,
where the authors' code leaves it out, so that the mean over the layers is r. Text between several images counts, which
the authors' code takes to be in one block. Nothing is evicted while decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.policy.allocation import Allocation, Layers, proportional, with_rates
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig

from ._protected import above_all, last_token, sinks
from ._unused import refusing

if TYPE_CHECKING:
    from torch import Tensor


def text_weights(among_rows: Tensor) -> Tensor:
    """The weights w of text tokens, float32 [rows], from their attention to each other, [q_heads, rows, rows]."""
    import torch

    attention = among_rows.mean(0)  # 0 above the diagonal: scores are taken as if attention were causal
    return attention.sum(0) / torch.arange(len(attention), 0, -1, device=attention.device)


def by_text_attention(layers: Layers, config: PLPHPConfig) -> Allocation:
    """Rates in proportion to the attention of the text to the vision tokens, for every row of the batch by itself."""
    rows = [
        proportional([layer.vision_score[row] for layer in layers], config.base_rate)
        for row in range(len(layers[0].vision_score))
    ]
    return with_rates(layers, list(zip(*rows, strict=True)))


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """The score s of the module's docstring, the same for all KV heads."""
    shared = scores.need("weighted_attention").mean(1, keepdim=True)
    kept = above_all(shared, sinks(scores) | last_token(scores), scores)
    return kept.expand(-1, scores.kv_heads, -1)


METHOD = Method(
    name="tgv_kv",
    summary="what the text that later text looks at attends to: rates of layers, and one choice for all heads",
    paper="arXiv:2606.03075",
    kv=KVStage(
        allocate=by_text_attention,
        score=score,
        evidence=lambda config: Evidence(rows="text_after_first", weigh_rows=text_weights),
        all_layers=lambda config: True,
        heads_compare=False,
    ),
    check=refusing(("gqa_reduction",), "ranks by the mean over all query heads"),
)
