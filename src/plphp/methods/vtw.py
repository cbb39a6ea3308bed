# SPDX-License-Identifier: Apache-2.0
"""Visual Tokens Withdrawal (arXiv:2405.05803): all vision tokens leave the prompt after some layer.

The decoder layers from K on do not get them; the layers before keep everything. With r the ``retention_rate`` and L
layers, ``K = max(1, round(r L))``: what is kept is K / L. The paper looks for K on a calibration set; here the
retention says it.

A prompt that ends in a vision token keeps that one, since the answer goes on from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plphp.policy.evidence import LayerScores
from plphp.policy.method import Method
from plphp.policy.stages import PrefillStage
from plphp.settings.config import PLPHPConfig

from ._prefill import refuse_settings
from ._unused import OF_RANKING, refuse_unused

if TYPE_CHECKING:
    from torch import Tensor


def rates(config: PLPHPConfig, layers: int) -> dict[int, float]:
    """No vision token from the first layer on that is beyond the budget."""
    return {max(1, math.floor(config.base_rate * layers + 0.5)): 0.0}


def nothing_stays(scores: LayerScores, rates: Sequence[float], config: PLPHPConfig) -> Tensor:
    """No vision token stays."""
    import torch

    return torch.zeros_like(scores.vision)


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse settings of heads and layers, and those by which vision tokens would be ranked: all of them leave."""
    refuse_settings(config)
    refuse_unused(config, ("query_rows", *OF_RANKING), "lets all vision tokens leave, so that none are ranked")


METHOD = Method(
    name="vtw",
    summary="inside prefill: all vision tokens leave the later layers",
    paper="arXiv:2405.05803",
    prefill=PrefillStage(rates, nothing_stays),
    check=check,
    when="to shorten prefill, where late layers do not look at images",
)
