# SPDX-License-Identifier: Apache-2.0
"""Layer level: from vision attention scores to retention rates. Pure functions.

Every allocator takes the scores of one or more layers, ``[layer][row]``, and returns a `RowAllocation` for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .config import PLPHPConfig
from .types import LayerClass, RowAllocation

Scores = Sequence[Sequence[float]]
Allocation = list[list[RowAllocation]]
Allocator = Callable[[Scores, PLPHPConfig], Allocation]


def classify(score: float, config: PLPHPConfig) -> LayerClass:
    """Class of a layer by its vision attention score and the config's thresholds (arXiv:2502.14504)."""
    if score >= config.attentive_threshold:
        return "attentive"
    if score < config.indifferent_threshold:
        return "indifferent"
    return "balanced"


def rate_of(layer_class: LayerClass, config: PLPHPConfig) -> float:
    """Retention rate of a class: r + dr, r, or r - dr, within [0, 1]."""
    shift = {"attentive": config.delta, "indifferent": -config.delta}.get(layer_class, 0.0)
    return min(1.0, max(0.0, config.base_rate + shift))


def by_vision_attention(scores: Scores, config: PLPHPConfig) -> Allocation:
    """Layer-level retention rate allocation of PLPHP.

    With ``target_retention`` the thresholds are the quantiles of each row's own scores over the given layers,
    so that as many layers gain ``delta`` as lose it; ties go to the earlier layer.

    Parameters
    ----------
    scores : sequence of sequence of float
        Vision attention scores, ``[layer][row]``; all layers of the prompt where ``target_retention`` is set.
    config : PLPHPConfig
        Rates and thresholds.

    Returns
    -------
    list of list of RowAllocation
        ``[layer][row]``.
    """
    if config.target_retention is None:
        classes = [[classify(score, config) for score in layer] for layer in scores]
    else:
        rows = [_by_rank([layer[row] for layer in scores], config) for row in range(len(scores[0]))]
        classes = [list(layer) for layer in zip(*rows, strict=True)]
    return [
        [RowAllocation(score, name, rate_of(name, config)) for score, name in zip(*layer, strict=True)]
        for layer in zip(scores, classes, strict=True)
    ]


def _by_rank(scores: Sequence[float], config: PLPHPConfig) -> list[LayerClass]:
    """Classes of the layers of one row: the top and the bottom ``class_quantile`` of them."""
    share = min(len(scores) // 2, round(config.class_quantile * len(scores)))
    order = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    classes: list[LayerClass] = ["balanced"] * len(scores)
    for layer in order[:share]:
        classes[layer] = "attentive"
    for layer in order[len(order) - share :]:
        classes[layer] = "indifferent"
    return classes


def uniform(scores: Scores, config: PLPHPConfig) -> Allocation:
    """The same rate in every layer: the ablation without the layer level."""
    return [[RowAllocation(score, "uniform", config.base_rate) for score in layer] for layer in scores]


def keep_all(scores: Scores, config: PLPHPConfig) -> Allocation:
    """Rate 1 in every layer."""
    return [[RowAllocation(score, "uniform", 1.0) for score in layer] for layer in scores]


def kept_count(rate: float, tokens: int, min_kept: int) -> int:
    """Vision tokens that a head keeps: ``round(rate * tokens)``, halves up, at least ``min_kept``.

    Examples
    --------
    >>> kept_count(0.4, 576, 1), kept_count(0.0, 576, 1), kept_count(0.5, 1, 1), kept_count(0.1, 0, 1)
    (230, 1, 1, 0)
    """
    return min(tokens, max(min_kept, math.floor(rate * tokens + 0.5)))
