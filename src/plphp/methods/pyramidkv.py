# SPDX-License-Identifier: Apache-2.0
"""PyramidKV (arXiv:2406.02069): budgets that fall from the first layer to the last.

With r the mean rate over L layers: ``last = r / beta``, ``first = 2 r - last``, and the layers between on a straight
line. Where ``first`` would be above 1 it is 1 and ``last = 2 r - 1``, so that the mean stays r.

Default: beta 20, the paper's. Changed: the rates are those of the vision tokens, all text is kept, and tokens are
ranked as in ``snapkv_vision``.
"""

from plphp.policy.allocation import Allocation, Layers, with_rates
from plphp.policy.method import Method
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._window import OPTIONS as WINDOW_OPTIONS
from ._window import by_window, check, window_evidence

OPTIONS = {**WINDOW_OPTIONS, "beta": Option(20.0, low=1)}


def pyramid(layers: Layers, config: PLPHPConfig) -> Allocation:
    """Rates on a straight line through the depth of the model; scores are not looked at."""
    mean = config.base_rate
    last = max(mean / settings(OPTIONS, config.options)["beta"], 2 * mean - 1)
    first = 2 * mean - last
    rates = []
    for layer in layers:
        depth = layer.index / (layer.count - 1) if layer.count > 1 else 0.5
        rates.append([min(1.0, first + (last - first) * depth)] * len(layer.vision_score))
    return with_rates(layers, rates)


METHOD = Method(
    name="pyramidkv",
    summary="early layers keep more than late ones, ranked as in snapkv_vision",
    paper="arXiv:2406.02069",
    kv=KVStage(
        allocate=pyramid,
        score=by_window,
        evidence=window_evidence,
    ),
    options=OPTIONS,
    check=check,
)
