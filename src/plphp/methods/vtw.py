# SPDX-License-Identifier: Apache-2.0
"""Visual Tokens Withdrawal (arXiv:2405.05803): all vision tokens leave the prompt after some layer.

From decoder layer K on no other token sees a vision token, in prefill too, and none of their KV is stored; the
layers before keep everything. With r the ``retention_rate`` and L layers, ``K = max(1, round(r L))``: what is kept is
K / L. The paper looks for K on a calibration set; here the retention says it.

As with FastV, prefill takes less time where one prompt without padding is read as a whole, since attention leaves the
tokens out, and as long as before in a batch and in later turns, where they are masked. A prompt that ends in a vision
token keeps that one, since the answer goes on from it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from plphp.policy.evidence import LayerScores
from plphp.policy.method import Method
from plphp.policy.stages import PrefillStage
from plphp.settings.config import PLPHPConfig

from ._prefill import refuse_exempt_layers

if TYPE_CHECKING:
    from torch import Tensor


def first_layer(config: PLPHPConfig, layers: int) -> int:
    """The first layer without vision tokens."""
    return max(1, math.floor(config.base_rate * layers + 0.5))


def nothing_stays(scores: LayerScores, config: PLPHPConfig, layers: int) -> Tensor:
    """No vision token stays."""
    import torch

    return torch.zeros_like(scores.vision)


METHOD = Method(
    name="vtw",
    summary="inside prefill: all vision tokens leave the later layers",
    paper="arXiv:2405.05803",
    prefill=PrefillStage(first_layer, lambda config, layers: 0.0, nothing_stays),
    check=lambda config, layers: refuse_exempt_layers(config),
    when="to shorten prefill, where late layers do not look at images",
)
