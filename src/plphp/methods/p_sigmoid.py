# SPDX-License-Identifier: Apache-2.0
"""P-Sigmoid (arXiv:2412.00556): vision tokens leave the prompt before every layer, along a sigmoid of the depth.

Of L decoder layers, layer l (counted from 0) gets the share

    rate(l) = 1                                     for l < ``first``
            = 1 / (1 + exp(k (l / L - c)))          from there on

of the vision tokens, with the steepness k = ``steepness``, and the midpoint c for which the mean over all layers is
``retention_rate``: it grows with c, so that it has one solution. ``first`` / L is the least that can be asked for. The
tokens are ranked anew before each layer, by the attention that the last prompt token gives them in the layer before,
averaged over all heads.

Default: first 1, steepness 8, ours. Simplified: the paper looks for both parameters of its sigmoid by Bayesian
optimisation of the score on a data set under a budget of operations; here the steepness is set, and the budget is the
mean rate. Our sigmoid is the plain one: how the paper writes its own could not be verified. Positions stay as they
were. Ours: ``evidence=bank`` ranks by the query bank ``bank`` instead, see `plphp.methods._prefill`.

A model whose first layers have no full attention has nothing to rank by before them: set ``first`` behind its first
layer with full attention.
"""

from __future__ import annotations

import math

from plphp.errors import ConfigError
from plphp.policy.method import Method
from plphp.policy.stages import PrefillStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from . import _prefill

OPTIONS = {"first": Option(1, low=1), "steepness": Option(8.0, low=0.1, high=1000), **_prefill.OPTIONS}
SATURATED = 40.0
"""Where a sigmoid is 1 in float64."""


def shares(midpoint: float, steepness: float, first: int, layers: int) -> list[float]:
    """The share of the vision tokens that each layer gets."""
    return [1.0] * first + [_sigmoid(steepness * (midpoint - layer / layers)) for layer in range(first, layers)]


def rates(config: PLPHPConfig, layers: int) -> dict[int, float]:
    """By the layers that get less than the layer before, what they get."""
    options = settings(OPTIONS, config.options)
    steepness, first = options["steepness"], options["first"]
    reach = SATURATED / steepness

    def mean(midpoint: float) -> float:
        return math.fsum(shares(midpoint, steepness, first, layers)) / layers

    midpoint = _prefill.solved(mean, config.base_rate, -reach, 1 + reach)
    return _prefill.falling(dict(enumerate(shares(midpoint, steepness, first, layers))))


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse a first layer that there is not, and a rate that the full layers alone are above."""
    _prefill.check(config, layers)
    first = settings(OPTIONS, config.options)["first"]
    if first >= layers:
        raise ConfigError(f"p_sigmoid's first must be below the number of decoder layers, {layers}, got {first}.")
    _prefill.check_least(config, first, layers, "set its option first lower")


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-max(-SATURATED, value)))


METHOD = Method(
    name="p_sigmoid",
    summary="inside prefill: before every layer a few vision tokens leave, most of them halfway through the depth",
    paper="arXiv:2412.00556",
    prefill=PrefillStage(rates, _prefill.kept_tokens, _prefill.evidence),
    options=OPTIONS,
    check=check,
    when="to shorten prefill, alone or before a method of the KV cache",
)
