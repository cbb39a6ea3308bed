# SPDX-License-Identifier: Apache-2.0
"""Layer level: from vision attention scores to retention rates. Pure functions.

Every allocator takes one or more scored layers, all of a prompt where the method needs them at once, and returns a
`RowAllocation` for each of their rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from plphp.settings.config import PLPHPConfig

from .evidence import LayerScores

LayerClass = Literal["attentive", "balanced", "indifferent", "uniform", "exempt", "no-vision", "non-finite"]
"""Why a layer has its rate: by its vision attention score, or because the rate is not the score's to decide."""


@dataclass(frozen=True)
class ScoredLayer:
    """A layer whose retention rate is to be decided.

    Parameters
    ----------
    index, count : int
        Its place among the layers that share the budget (those that are pruned and not exempt), and their number.
    vision_score : sequence of float
        Vision attention score gamma of each row, in [0, 1].
    scores : LayerScores
        Everything that is known of the layer.
    """

    index: int
    count: int
    vision_score: Sequence[float]
    scores: LayerScores


@dataclass(frozen=True)
class RowAllocation:
    """What the layer level decided for one layer and one row.

    Parameters
    ----------
    vision_score : float
        Vision attention score gamma, in [0, 1]; 0 where it is not finite.
    layer_class : str
        Class of the layer for this prompt.
    rate : float
        Retention rate, in [0, 1].
    shares : tuple of float, optional
        For each rung of the stage (`plphp.policy.stages.KVStage.rungs`), the fraction of the vision entries that are
        held in it or in a better one, rising up to ``rate``. Default: those of the config's ladder, in proportion.
    """

    vision_score: float
    layer_class: LayerClass
    rate: float
    shares: tuple[float, ...] | None = None


Layers = Sequence[ScoredLayer]
"""The layers whose rates are decided together: a single one, or all that have a budget."""
Allocation = list[list[RowAllocation]]
"""What each layer keeps of each row, as ``[layer][row]``."""
Allocator = Callable[[Layers, PLPHPConfig], Allocation]
"""The layer level: from the scores of layers to what each of them keeps."""


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


def by_vision_attention(layers: Layers, config: PLPHPConfig) -> Allocation:
    """Layer-level retention rate allocation of PLPHP.

    With ``target_retention``, and with a ladder, the thresholds are the quantiles of each row's own scores over all
    layers, so that as many layers gain ``delta`` as lose it; ties go to the earlier layer. For the first layers of a
    prompt alone the result is an upper bound: a layer's position in the order of scores only falls while later layers
    are scored.

    Parameters
    ----------
    layers : sequence of ScoredLayer
        All layers of the prompt where the config sorts them by their order (`PLPHPConfig.sorts_by_order`), or the first
        of them for the most that each keeps.
    config : PLPHPConfig
        Rates and thresholds.

    Returns
    -------
    list of list of RowAllocation
        ``[layer][row]``.
    """
    scores = [layer.vision_score for layer in layers]
    if not config.sorts_by_order:
        classes = [[classify(score, config) for score in layer] for layer in scores]
    else:
        count = layers[0].count
        rows = [_by_rank([layer[row] for layer in scores], count, config) for row in range(len(scores[0]))]
        classes = [list(layer) for layer in zip(*rows, strict=True)]
    return [
        [RowAllocation(score, name, rate_of(name, config)) for score, name in zip(*layer, strict=True)]
        for layer in zip(scores, classes, strict=True)
    ]


def _by_rank(scores: Sequence[float], count: int, config: PLPHPConfig) -> list[LayerClass]:
    """Classes of the first of ``count`` layers of one row: the top and the bottom ``class_quantile`` of all of them."""
    share = min(count // 2, round(config.class_quantile * count))
    order = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    classes: list[LayerClass] = ["balanced"] * len(scores)
    for layer in order[:share]:
        classes[layer] = "attentive"
    for layer in order[count - share :]:
        classes[layer] = "indifferent"
    return classes


def uniform(layers: Layers, config: PLPHPConfig) -> Allocation:
    """The same rate in every layer: the ablation without the layer level."""
    return with_rates(layers, [[config.base_rate] * len(layer.vision_score) for layer in layers])


def keep_all(layers: Layers, config: PLPHPConfig) -> Allocation:
    """Rate 1 in every layer."""
    return with_rates(layers, [[1.0] * len(layer.vision_score) for layer in layers])


def with_rates(layers: Layers, rates: Sequence[Sequence[float]]) -> Allocation:
    """An allocation without classes, from rates ``[layer][row]``."""
    return [
        [RowAllocation(score, "uniform", rate) for score, rate in zip(layer.vision_score, row, strict=True)]
        for layer, row in zip(layers, rates, strict=True)
    ]


def proportional(weights: Sequence[float], mean: float) -> list[float]:
    """Rates in proportion to weights, whose mean is given.

    What would be above 1 is cut to 1, and the rest of it goes to the others in proportion to their weights; where
    these are 0, in equal parts.

    Parameters
    ----------
    weights : sequence of float
        At least 0.
    mean : float
        In [0, 1].

    Examples
    --------
    >>> proportional([1, 3], 0.25), proportional([1, 9, 0], 0.5)
    ([0.125, 0.375], [0.5, 1.0, 0.0])
    """
    rates = [0.0] * len(weights)
    open_layers, budget = list(range(len(weights))), mean * len(weights)
    while open_layers:
        total = sum(weights[layer] for layer in open_layers)
        for layer in open_layers:
            rates[layer] = budget * (weights[layer] / total if total > 0 else 1 / len(open_layers))
        full = [layer for layer in open_layers if rates[layer] >= 1]
        if not full:
            break
        for layer in full:
            rates[layer] = 1.0
        open_layers = [layer for layer in open_layers if layer not in full]
        budget -= len(full)
    return [min(1.0, max(0.0, rate)) for rate in rates]


def kept_count(rate: float, tokens: int, min_kept: int) -> int:
    """Vision tokens that a head keeps: ``round(rate * tokens)``, halves up, at least ``min_kept``.

    Examples
    --------
    >>> kept_count(0.4, 576, 1), kept_count(0.0, 576, 1), kept_count(0.5, 1, 1), kept_count(0.1, 0, 1)
    (230, 1, 1, 0)
    """
    return min(tokens, max(min_kept, math.floor(rate * tokens + 0.5)))
