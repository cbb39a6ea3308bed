# SPDX-License-Identifier: Apache-2.0
"""VL-Cache (arXiv:2410.23317): layer budgets by attention density, tokens by post-vision attention.

The query rows are the text after the last image. An entry counts as dense where a row gives it at least ``p`` times
the row's maximum; the density of a layer is the mean over rows and heads of the share of dense entries among those
that the row sees. Rates are proportional to density, with the mean over the layers given, and cut to 1. Each KV
head keeps the vision tokens with the most attention accumulated over the same rows.

Default: p 0.01, the paper's. Changed: only vision tokens are evicted, the floor of a layer is ``min_kept`` in the
place of 1 %, and what is cut at 1 goes to the other layers.
"""

from plphp.policy.allocation import Allocation, Layers, proportional, with_rates
from plphp.policy.evidence import Evidence
from plphp.policy.method import Method
from plphp.policy.rankers import per_head
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

OPTIONS = {"p": Option(0.01, low=0, high=1)}


def evidence(config: PLPHPConfig) -> Evidence:
    """Density over the post-vision rows."""
    return Evidence(rows="text", density=settings(OPTIONS, config.options)["p"])


def by_density(layers: Layers, config: PLPHPConfig) -> Allocation:
    """Rates in proportion to each layer's density, for every row of the batch by itself."""
    density = [layer.scores.need("density").mean(1).tolist() for layer in layers]
    rows = [proportional(row, config.base_rate) for row in zip(*density, strict=True)]
    return with_rates(layers, list(zip(*rows, strict=True)))


METHOD = Method(
    name="vl_cache",
    summary="layers with denser attention keep more, tokens by the attention of the text after the images",
    paper="arXiv:2410.23317",
    kv=KVStage(
        allocate=by_density,
        score=per_head,
        evidence=evidence,
        all_layers=lambda config: True,
    ),
    options=OPTIONS,
)
