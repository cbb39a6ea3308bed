# SPDX-License-Identifier: Apache-2.0
"""ZipVL (arXiv:2410.08584): in each layer as many tokens attend, and are kept, as carry a share of its attention.

In each layer, with A[i, j] the attention of the *probe rows* i (the last tokens of the prompt and some that are drawn
at random) to the tokens j, averaged over all heads, before any token is left out::

    a_j = sum_i A[i, j]                                      accumulated attention
    p   = min { n : the n largest a_j are at least tau * sum_j a_j together }
    s_j = a_j / (how many probe rows stand at j or behind)   normalised, since early tokens are seen by more rows

The p tokens with the largest s_j are important, one choice for all heads. While the layer reads the prompt, attention
runs among them alone, and is 0 for the others, which stay in the residual stream and pass the MLP. Of the KV cache the
important tokens are kept whole; the others are dropped (``unimportant=dropped``, as in the paper's second version) or
held in few bits (``unimportant=kivi2``; the first version quantizes both, the important ones to more bits).

The paper's run is ``zipvl:tau=0.975``, the larger of the two thresholds in its tables (the other is 0.96). Without
``tau`` each layer keeps the same share ``retention_rate`` (or ``target_retention``) of its vision tokens: attention
needs the budget of a layer before a later layer has been scored, so that no tau can be solved for their mean.

Simplified: text is always important, whatever its s_j, and is among the p where its s_j says so; and so are the best
``min_kept`` vision tokens, whatever tau says. Layers with a sliding window attend as ever. In a later turn the sums
are over the tokens behind the pruned prompts of earlier turns. The compression of the answer every 100 tokens is left
out. Not verified, since the paper was read in summaries: the number of probe rows, here 64 at the end
(``query_rows``) and 64 drawn (``random_rows``).

With ``attention=dense`` the layer budgets alone are taken, which is ours: prefill attends as ever, the probe rows are
the text after the last image, sums are over the vision tokens, and each KV head keeps its own. Without ``tau`` it is
then the tau for which the mean rate over the layers of this prompt is ``retention_rate``: the n tokens with the least
attention before them, over all layers together.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plphp.errors import ConfigError
from plphp.policy.allocation import Allocation, Layers, with_rates
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.rankers import per_head, pooled
from plphp.policy.selection import keep_mask
from plphp.policy.stages import AttentionStage, KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.ladder import PLAIN_RUNGS, WHOLE
from plphp.settings.options import Option, settings

from ._unused import refuse_unused

if TYPE_CHECKING:
    from torch import Tensor

DROPPED = "dropped"
OPTIONS = {
    "tau": Option(None, low=0, high=1, sets_rate=True),
    "attention": Option("important", choices=("important", "dense")),
    "unimportant": Option(DROPPED, choices=(DROPPED, *PLAIN_RUNGS)),
    "random_rows": Option(64, low=0),
}
RECENT_ROWS = 64
"""Probe rows at the end of the prompt, for a config that leaves ``query_rows`` open."""
PROBE_ROWS = RECENT_ROWS + 64
"""All probe rows, for a config that leaves their numbers open."""


def of(config: PLPHPConfig) -> dict[str, Any]:
    """All options by name."""
    return settings(OPTIONS, config.options)


def attends_densely(config: PLPHPConfig) -> bool:
    """Whether the layer budgets alone are taken."""
    dense: bool = of(config)["attention"] == "dense"
    return dense


def evidence(config: PLPHPConfig) -> Evidence:
    """The probe rows."""
    if attends_densely(config):
        return Evidence(rows="text")
    return Evidence(rows=RECENT_ROWS, random_rows=of(config)["random_rows"])


def received(scores: LayerScores) -> Tensor:
    """Attention that each token gets from all probe rows together, mean over the heads: float [batch, seq]."""
    return scores.attention.mean(1) * scores.need("queries").sum(1, keepdim=True)


def normalised(scores: LayerScores) -> Tensor:
    """The same, of each probe row that sees the token: float [batch, seq]."""
    seen = scores.need("queries").flip(1).cumsum(1).flip(1)
    return received(scores) / seen.clamp(min=1)


def mass_before(attention: Tensor) -> Tensor:
    """float64 [tokens]; of each token in falling order of attention, the share of those before it."""
    import torch

    attention = attention.double()
    share = attention.sort(descending=True).values / attention.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.nn.functional.pad(share.cumsum(0), (1, 0))[:-1]


def important_count(attention: Tensor, tau: float) -> int:
    """The least number of tokens that get a share ``tau`` of the attention to all of them, float [tokens]."""
    # Sums of all shares may round to less than 1.
    return len(attention) if tau == 1 else int((mass_before(attention) < tau).sum())


def rates(scores: LayerScores, config: PLPHPConfig) -> list[float]:
    """Which share of the vision tokens of each row is important in a layer."""
    tau = of(config)["tau"]
    if tau is None:
        return [config.base_rate] * len(scores.valid)
    shares = []
    score = normalised(scores).masked_fill(~scores.valid, -math.inf)
    # Equal scores in the order of the tokens, as where they are selected.
    order = score.sort(descending=True, stable=True).indices
    for row, attention in enumerate(received(scores)):
        best = order[row, : important_count(attention[scores.valid[row]], tau)]
        vision = scores.vision[row]
        shares.append(int(vision[best].sum()) / max(1, int(vision.sum())))
    return shares


def important(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """The vision tokens that attend in a layer: those that its KV cache keeps whole, bool [batch, seq]."""
    score = pooled(normalised(scores)[:, None], scores, config)
    return keep_mask(score, scores, rates(scores, config), config)[:, 0] & scores.vision


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """One score for all KV heads, or with dense attention one for each: float [batch, kv_heads, seq]."""
    if attends_densely(config):
        return per_head(scores, config)
    return normalised(scores)[:, None].expand(-1, scores.kv_heads, -1)


def allocate(layers: Layers, config: PLPHPConfig) -> Allocation:
    """The share of important tokens of every layer and row; the others may be held in few bits."""
    if attends_densely(config):
        return by_mass(layers, config)
    allocation = with_rates(layers, [rates(layer.scores, config) for layer in layers])
    if rungs(config) is None or config.ladder is not None:
        return allocation
    return [[replace(row, rate=1.0, shares=(row.rate, 1.0)) for row in rows] for rows in allocation]


def by_mass(layers: Layers, config: PLPHPConfig) -> Allocation:
    """Rates by the cumulative attention to the vision tokens, for every row of the batch by itself."""
    import torch

    tau = of(config)["tau"]
    rows = []
    for row in range(len(layers[0].vision_score)):
        # Of different lengths where tokens have left inside prefill.
        of_layers = [
            mass_before(layer.scores.attention[row].double().mean(0)[layer.scores.vision[row]]).cpu()
            for layer in layers
        ]
        before = torch.cat(of_layers)
        if tau is None:
            count = math.floor(config.base_rate * len(before) + 0.5)
            kept = torch.zeros(len(before), dtype=torch.bool)
            kept[before.sort(stable=True).indices[:count]] = True
        else:
            kept = before < tau
        parts = kept.split([len(mass) for mass in of_layers])
        rows.append([int(part.sum()) / max(1, len(part)) for part in parts])
    return with_rates(layers, list(zip(*rows, strict=True)))


def rungs(config: PLPHPConfig) -> tuple[str, ...] | None:
    """What the vision entries are held in: the important ones whole, the others by the option."""
    if config.ladder is not None:
        return config.ladder.names
    rung = of(config)["unimportant"]
    return None if rung == DROPPED else (WHOLE, rung)


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse what contradicts each other, and with important tokens what is of single heads or says how much is kept
    beside them."""
    options = of(config)
    given = [
        name for name in ("target_retention", "retention_rate") if getattr(config, name) != getattr(PLPHPConfig, name)
    ]
    if given and options["tau"] is not None:
        raise ConfigError(
            f"zipvl takes its option tau or {given[0]}, not both: with tau the retention is what comes out."
        )
    if options["attention"] == "dense":
        unused = [name for name in ("unimportant", "random_rows") if options[name] != OPTIONS[name].default]
        if unused:
            raise ConfigError(
                f"zipvl:attention=dense has no important tokens, and {' and '.join(unused)} says what is done by them: "
                "leave that out, or attention=dense."
            )
        return
    if config.tiers is not None:
        raise ConfigError(
            f"zipvl holds important tokens whole, got tiers={config.tiers}: name the rung of the others, as in "
            "zipvl:unimportant=kivi2, or give tiers to zipvl:attention=dense."
        )
    refuse_unused(
        config, ("gqa_reduction",), "ranks by the mean over all heads, unless each keeps its own (attention=dense)"
    )
    if config.heads == "ragged":
        raise ConfigError(
            "zipvl chooses the same tokens for all heads of a layer, which attend together: leave out heads=ragged, or "
            "take zipvl:attention=dense."
        )


METHOD = Method(
    name="zipvl",
    summary="each layer attends in prefill among the tokens that carry a share of its attention, and keeps these",
    paper="arXiv:2410.08584",
    attention=AttentionStage(important, evidence, acts=lambda config: not attends_densely(config)),
    kv=KVStage(
        allocate=allocate,
        score=score,
        evidence=evidence,
        all_layers=lambda config: attends_densely(config) and of(config)["tau"] is None,
        rungs=rungs,
    ),
    options=OPTIONS,
    check=check,
)
