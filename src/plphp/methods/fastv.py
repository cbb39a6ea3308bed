# SPDX-License-Identifier: Apache-2.0
"""FastV (arXiv:2403.06764): vision tokens leave the prompt after an early layer.

The vision tokens are ranked by the attention that the last prompt token gives them in decoder layer ``layer`` - 1
(counted from 0), averaged over all heads. The lower ones leave before ``layer``: it and the layers behind it do not get
them. The layers before keep everything.

``retention_rate`` r is the mean over all L layers, so with K = ``layer`` the later layers keep
``(L r - K) / (L - K)`` of the vision tokens: K / L is the least that can be asked for.

Default: layer 2, the paper's. The paper's text speaks of the attention that a token receives from all others; the last
token's is what the authors' code ranks by, and what later comparisons mean by FastV. The lower tokens are not computed
in the later layers. Positions stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.evidence import LayerScores
from plphp.policy.method import Method
from plphp.policy.rankers import pooled, shared_by_heads
from plphp.policy.selection import keep_mask
from plphp.policy.stages import PrefillStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._prefill import refuse_exempt_layers

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {"layer": Option(2, low=1)}


def first_layer(config: PLPHPConfig) -> int:
    """The first layer without the lower vision tokens."""
    first: int = settings(OPTIONS, config.options)["layer"]
    return first


def rates(config: PLPHPConfig, layers: int) -> dict[int, float]:
    """Retention rate of the layers from ``layer`` on, for the mean over all layers that the config asks for."""
    first = first_layer(config)
    return {first: min(1.0, max(0.0, (layers * config.base_rate - first) / (layers - first)))}


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse a rate that the full layers alone are above."""
    refuse_exempt_layers(config)
    first = first_layer(config)
    if first >= layers:
        raise ConfigError(f"fastv's layer must be below the number of decoder layers, {layers}, got {first}.")
    if layers * config.base_rate - first < -1e-9:
        least = math.ceil(first / layers * 1e4) / 1e4
        raise ConfigError(
            f"fastv keeps everything in its first {first} of {layers} layers, so the least retention_rate is "
            f"{least:g}, got {config.base_rate:g}: ask for more, or set its option layer lower."
        )


def kept_tokens(scores: LayerScores, rates: Sequence[float], config: PLPHPConfig) -> Tensor:
    """The best vision tokens of each row by the mean over all heads, bool [batch, seq]."""
    score = pooled(shared_by_heads(scores, config)[:, :1], scores, config)
    return keep_mask(score, scores, list(rates), config)[:, 0]


METHOD = Method(
    name="fastv",
    summary="inside prefill: the vision tokens that an early layer attends to least leave all later layers",
    paper="arXiv:2403.06764",
    prefill=PrefillStage(rates, kept_tokens),
    options=OPTIONS,
    check=check,
    when="to shorten prefill, alone or before a method of the KV cache",
)
