# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop (arXiv:2410.17247): vision tokens leave the prompt in steps, by the same factor each time.

The L decoder layers are cut into S = ``stages`` parts of equal length. At the end of each part but the last the vision
tokens that are left are ranked, and a share of them goes on: with the factor f = ``factor``, layer l (counted from 0)
gets the share ``f ** floor(S l / L)``. With f = 0.5 of 32 layers, the paper's: 1/2 from layer 8 on, 1/4 from layer 16,
1/8 from layer 24.

Without ``factor``, which is the default, f is the one for which the mean over all layers is ``retention_rate``: f = 0.5
is a mean of 15/32, and the layers of the first part alone, 1 / S, are the least that can be asked for.

Default: 4 stages, the paper's; its f = 0.5 is ``factor=0.5``. Simplified: tokens are ranked by the attention that the
last prompt token gives them in the last layer of a part, averaged over all heads. The paper works that attention out
from the queries and keys of the layer behind it, of the last token of the instruction, before that layer runs.
Positions stay as they were. Ours: ``evidence=bank`` ranks by the query bank ``bank`` instead, see
`plphp.methods._prefill`.
"""

from __future__ import annotations

import math
from functools import partial

from plphp.errors import ConfigError
from plphp.policy.method import Method
from plphp.policy.stages import PrefillStage
from plphp.settings.config import DEFAULT_RATE, PLPHPConfig
from plphp.settings.options import Option, settings

from . import _prefill

OPTIONS = {"factor": Option(None, low=0, high=1, sets_rate=True), "stages": Option(4, low=2), **_prefill.OPTIONS}


def shares(factor: float, stages: int, layers: int) -> list[float]:
    """The share of the vision tokens that each layer gets."""
    return [factor ** (stages * layer // layers) for layer in range(layers)]


def mean_share(factor: float, stages: int, layers: int) -> float:
    """The mean of `shares` over the layers, which grows with the factor."""
    return math.fsum(shares(factor, stages, layers)) / layers


def rates(config: PLPHPConfig, layers: int) -> dict[int, float]:
    """By the first layers of the parts behind the first, what goes on there."""
    options = settings(OPTIONS, config.options)
    factor, stages = options["factor"], options["stages"]
    if factor is None:
        mean = partial(mean_share, stages=stages, layers=layers)
        factor = _prefill.solved(mean, config.base_rate, 0.0, 1.0)
    return _prefill.falling(dict(enumerate(shares(factor, stages, layers))))


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse two ways to say how much stays, and a rate that the layers of the first part alone are above."""
    _prefill.check(config, layers)
    options = settings(OPTIONS, config.options)
    if options["factor"] is None:
        whole = math.ceil(layers / options["stages"])
        _prefill.check_least(config, whole, layers, "set its option stages higher")
    elif config.base_rate != DEFAULT_RATE:
        mean = mean_share(options["factor"], options["stages"], layers)
        raise ConfigError(
            f"pyramiddrop takes its option factor or a rate, not both: factor={options['factor']:g} says how much "
            f"stays, a mean of {mean:.4g} of these {layers} layers, got the rate {config.base_rate:g}, too."
        )


METHOD = Method(
    name="pyramiddrop",
    summary="inside prefill: in steps through the depth, the vision tokens that are attended to least leave",
    paper="arXiv:2410.17247",
    prefill=PrefillStage(rates, _prefill.kept_tokens, _prefill.evidence),
    options=OPTIONS,
    check=check,
    when="to shorten prefill, alone or before a method of the KV cache",
)
