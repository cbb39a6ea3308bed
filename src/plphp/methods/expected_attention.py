# SPDX-License-Identifier: Apache-2.0
"""Expected attention (arXiv:2510.00636): what queries to come will look at, from how the prompt's own are distributed.

Queries without their rotary position are taken for Gaussian. With mu and C the mean and the covariance of a query head
over the tokens of the prompt, both turned by the mean of the rotations of the next ``n_future`` positions, scaling c
(1 / sqrt(d)), k_j and v_j the key and the value of entry j:

    z[j] = softmax_j(c k_j . mu + c^2 / 2 k_j' C k_j)        the expected attention of the query head
    s[j] = (mean over the query heads of z[j] + epsilon) ||v_j||

Each KV head keeps the best of s. The first 4 tokens, on which attention falls for want of anything better, are left out
of mu, C and the softmax, and are always kept.

Defaults: 512 positions and epsilon 0, those of the authors' code (NVIDIA's kvpress, Apache-2.0). With
``heads="ragged"``, as in the paper's best results, kvpress sets epsilon to 0.01.

Changed: vision tokens alone are evicted. Query heads of a KV head are combined with ``gqa_reduction``, whose default is
the mean. Queries are those of the tokens of this turn, taken behind the norms of a model that has them (kvpress refuses
such models) and turned back; mu and C and the softmax are those of this turn's prompt. With m-RoPE a vision token has
no single position to be turned back by: there the queries of the text behind the last image count, and in the first
turn those before the first. Where none is left to count, the norms of the values rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.policy.allocation import uniform
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.rankers import combined
from plphp.policy.stages import KVStage
from plphp.policy.states import LayerStates
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._protected import above_all, sinks
from ._unused import refusing

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {"n_future": Option(512, low=1), "epsilon": Option(0.0, low=0)}


def queries_to_come(states: LayerStates, counts: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the queries behind the prompt.

    Parameters
    ----------
    states : LayerStates
        With the queries of the prompt and the rotation.
    counts : Tensor
        bool [batch, rows]; the queries that they are taken from.
    positions : int
        How many positions behind the prompt the rotation is averaged over.

    Returns
    -------
    tuple of Tensor
        float32 [batch, q_heads, dim] and [batch, q_heads, dim, dim]; 0 where no query counts.
    """
    rotation = states.need_rotation()
    start = rotation.rotated(states.queries, -states.position[:, None])
    turned = rotation.rotated_on_average(start, states.end[:, None], positions)
    number = counts.sum(1).clamp(min=1)[:, None, None]
    counted = counts[:, None, :, None]
    mean = turned.where(counted, 0).sum(2) / number
    centred = (turned - mean[:, :, None]).where(counted, 0)
    return mean, centred.mT @ centred / number[..., None]


def expected(states: LayerStates, seen: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """The expected attention z of every query head to the entries ``seen``, bool [batch, seq].

    Returns
    -------
    Tensor
        float32 [batch, q_heads, seq]; 0 on all other entries.
    """
    import torch

    keys = states.keys
    kv_heads = keys.shape[1]
    means, covariances = mean.unflatten(1, (kv_heads, -1)), covariance.unflatten(1, (kv_heads, -1))
    logits = []
    for head in range(means.shape[2]):  # of each KV head: all at once would take as much as all queries
        k = keys.float() * states.scaling
        linear = (k @ means[:, :, head, :, None])[..., 0]
        logits.append(linear + ((k @ covariances[:, :, head]) * k).sum(-1) / 2)
    masked = torch.stack(logits, dim=2).flatten(1, 2).masked_fill(~seen[:, None], -torch.inf)
    # A row in which nothing is left to see would be NaN.
    return masked.softmax(-1).masked_fill(~seen[:, None], 0)


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """The score s of the module's docstring."""
    options, states, first = settings(OPTIONS, config.options), scores.need_states(), sinks(scores)
    counts = states.asking & (states.position >= 0) & ~first[:, states.index]
    mean, covariance = queries_to_come(states, counts, options["n_future"])
    attention = combined(expected(states, scores.valid & ~first, mean, covariance), scores.kv_heads, config)
    return above_all((attention + options["epsilon"]) * scores.need("value_norm"), first, scores)


METHOD = Method(
    name="expected_attention",
    summary="every KV head keeps what queries distributed as the prompt's own would look at next",
    paper="arXiv:2510.00636",
    kv=KVStage(
        allocate=uniform,
        score=score,
        evidence=lambda config: Evidence(value_norm=True, states="prompt", rotation=True),
    ),
    options=OPTIONS,
    check=refusing(("query_rows",), "asks with the distribution of all queries of the prompt"),
)
