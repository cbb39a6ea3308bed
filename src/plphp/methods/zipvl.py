# SPDX-License-Identifier: Apache-2.0
"""The layer budgets of ZipVL (arXiv:2410.08584): as many tokens as carry a given attention mass.

In each layer, with a the attention to the vision tokens (mean over heads and query rows, normalised to 1 over them)
in falling order: ``k = min { n : a_1 + ... + a_n >= tau }``. With ``tau`` (0.975 in the paper) the retention is what
comes out. Without, which is the default, tau is the one for which the mean rate over the layers of this prompt is
``target_retention`` or ``retention_rate``: the n tokens with the least mass before them, over all layers together.

Only the allocation is taken: ZipVL also leaves the other tokens out of prefill's attention and takes all heads
together, here each KV head ranks its own. The query rows are the text after the last image, in the place of ZipVL's
probe tokens, and the mass is that of the vision tokens, since all text is kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.allocation import Allocation, Layers, with_rates
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.rankers import per_head
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {"tau": Option(None, low=0, high=1)}


def mass_before(scores: LayerScores, row: int) -> Tensor:
    """float64 [vision tokens]; of each vision token in falling order of attention, the share of those before it."""
    import torch

    attention = scores.attention[row].double().mean(0)[scores.vision[row]]
    share = attention.sort(descending=True).values / attention.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.nn.functional.pad(share.cumsum(0), (1, 0))[:-1]


def by_mass(layers: Layers, config: PLPHPConfig) -> Allocation:
    """Rates by cumulative attention mass, for every row of the batch by itself."""
    import torch

    tau = settings(OPTIONS, config.options)["tau"]
    rows = []
    for row in range(len(layers[0].vision_score)):
        # Of different lengths where tokens have left inside prefill.
        of_layers = [mass_before(layer.scores, row).cpu() for layer in layers]
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


def check(config: PLPHPConfig, layers: int) -> None:
    """A threshold and a target are two ways to say the same."""
    if config.target_retention is not None and settings(OPTIONS, config.options)["tau"] is not None:
        raise ConfigError(
            "zipvl takes its option tau or target_retention, not both: with tau the retention is what comes out."
        )


METHOD = Method(
    name="zipvl",
    summary="each layer keeps as many tokens as carry a share of its attention mass, per KV head",
    paper="arXiv:2410.08584 (the allocation)",
    kv=KVStage(
        allocate=by_mass,
        score=per_head,
        evidence=lambda config: Evidence(rows="text"),
        all_layers=lambda config: settings(OPTIONS, config.options)["tau"] is None,
    ),
    options=OPTIONS,
    check=check,
)
