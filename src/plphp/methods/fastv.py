# SPDX-License-Identifier: Apache-2.0
"""FastV (arXiv:2403.06764): vision tokens leave the prompt after an early layer.

The vision tokens are ranked by the attention that the last prompt token gives them in decoder layer ``layer`` - 1
(counted from 0), averaged over all heads. The lower ones leave before ``layer``: it and the layers behind it do not get
them. The layers before keep everything.

``retention_rate`` r is the mean over all L layers, so with K = ``layer`` the later layers keep
``(L r - K) / (L - K)`` of the vision tokens: K / L is the least that can be asked for.

Default: layer 2, the paper's. The paper's text speaks of the attention that a token receives from all others; the last
token's is what the authors' code ranks by, and what later comparisons mean by FastV. The lower tokens are not computed
in the later layers. Positions stay as they were. Ours: ``evidence=bank`` ranks by the query bank ``bank`` instead, see
`plphp.methods._prefill`.
"""

from __future__ import annotations

from plphp.errors import ConfigError
from plphp.policy.method import Method
from plphp.policy.stages import PrefillStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from . import _prefill

OPTIONS = {"layer": Option(2, low=1), **_prefill.OPTIONS}


def first_layer(config: PLPHPConfig) -> int:
    """The first layer without the lower vision tokens."""
    first: int = settings(OPTIONS, config.options)["layer"]
    return first


def rates(config: PLPHPConfig, layers: int) -> dict[int, float]:
    """Retention rate of the layers from ``layer`` on, for the mean over all layers that the config asks for."""
    first = first_layer(config)
    return {first: min(1.0, max(0.0, (layers * config.base_rate - first) / (layers - first)))}


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse a layer that there is not, and a rate that the full layers alone are above."""
    _prefill.check(config, layers)
    first = first_layer(config)
    if first >= layers:
        raise ConfigError(f"fastv's layer must be below the number of decoder layers, {layers}, got {first}.")
    _prefill.check_least(config, first, layers, "set its option layer lower")


METHOD = Method(
    name="fastv",
    summary="inside prefill: the vision tokens that an early layer attends to least leave all later layers",
    paper="arXiv:2403.06764",
    prefill=PrefillStage(rates, _prefill.kept_tokens, _prefill.evidence),
    options=OPTIONS,
    check=check,
    when="to shorten prefill, alone or before a method of the KV cache",
)
