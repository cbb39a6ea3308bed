# SPDX-License-Identifier: Apache-2.0
"""What methods of the prefill stage have in common: by what evidence vision tokens are ranked before they leave.

With ``evidence=last_row``, the default, a vision token ranks by the attention that the last prompt token gives it,
averaged over all heads. With ``evidence=bank``, ours, the queries of the query bank ``bank`` ask
(`plphp.methods.query_bank`): a vision token ranks by its best position for any of them in any KV head, then by its mean
attention over queries and heads, so that what any part of an answer would look at stays. Either way the choice is one
for all heads, since a token that has left is missing in all of them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.rankers import pooled, shared_best_position, shared_by_heads
from plphp.policy.selection import keep_mask
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._unused import OF_HEADS, refuse_unused

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {"evidence": Option("last_row", choices=("last_row", "bank")), "bank": Option("")}
STEPS = 2**40
"""How finely the interval is cut in which `solved` looks."""


def evidence(config: PLPHPConfig) -> Evidence:
    """What the option ``evidence`` looks at."""
    options = settings(OPTIONS, config.options)
    return Evidence(bank=options["bank"], best_position=True) if options["evidence"] == "bank" else Evidence()


def kept_tokens(scores: LayerScores, rates: Sequence[float], config: PLPHPConfig) -> Tensor:
    """The best vision tokens of each row by the option ``evidence``, one choice for all heads.

    Returns
    -------
    Tensor
        bool [batch, seq].
    """
    by_bank = settings(OPTIONS, config.options)["evidence"] == "bank"
    score = shared_best_position(scores, config) if by_bank else shared_by_heads(scores, config)[:, :1]
    return keep_mask(pooled(score, scores, config), scores, list(rates), config)[:, 0]


def refuse_settings(config: PLPHPConfig) -> None:
    """Raise `ConfigError` for settings of single layers and heads: a token that has left is missing in all of them."""
    refuse_unused(config, ("exempt_layers",), "takes tokens out of all later layers, so none of them can be exempt")
    refuse_unused(config, OF_HEADS, "takes tokens out of all heads")


def check(config: PLPHPConfig, layers: int) -> None:
    """Raise `ConfigError` for settings without a use, and where bank and evidence do not go together."""
    refuse_settings(config)
    options = settings(OPTIONS, config.options)
    if options["evidence"] != "bank":
        if options["bank"]:
            raise ConfigError(
                f"{config.method} asks with a query bank where its evidence is that: add evidence=bank, or leave out "
                f"bank={options['bank']}."
            )
        refuse_unused(
            config, ("gqa_reduction",), "ranks by the mean over all heads, unless a bank asks (evidence=bank)"
        )
        return
    if not options["bank"]:
        raise ConfigError(
            f"{config.method}:evidence=bank needs queries of the model's answers: collect them with `plphp collect` "
            f"and give their file, as in '{config.method}:evidence=bank,bank=bank.safetensors'; the bundled model's "
            "is 'bank=bundled'."
        )
    if config.query_rows is not None:
        raise ConfigError(
            f"{config.method}:evidence=bank asks with the queries of its bank, got query_rows={config.query_rows!r}: "
            "leave it out."
        )
    from plphp.policy.bank import check_depth

    check_depth(options["bank"], layers)


def check_least(config: PLPHPConfig, whole: int, layers: int, to_lower: str) -> None:
    """Raise `ConfigError` for a mean rate that the layers before the first drop alone are above.

    Parameters
    ----------
    config : PLPHPConfig
        Its ``base_rate`` is the mean over all layers.
    whole, layers : int
        Layers that keep all vision tokens in any case, and all of them.
    to_lower : str
        What else than a higher rate helps, to end the message with.
    """
    if layers * config.base_rate - whole < -1e-9:
        least = math.ceil(whole / layers * 1e4) / 1e4
        raise ConfigError(
            f"{config.method} keeps everything in its first {whole} of {layers} layers, so the least retention_rate is "
            f"{least:g}, got {config.base_rate:g}: ask for more, or {to_lower}."
        )


def solved(mean: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a function that never falls reaches a value between ``low`` and ``high``; ``high`` where it does not."""
    width = (high - low) / STEPS
    return low + width * bisect_left(range(STEPS), target, key=lambda step: mean(low + width * step))


def falling(rates: Mapping[int, float]) -> dict[int, float]:
    """The layers whose rate is below that of the layer before, by more than float error, with their rates."""
    drops, before = {}, 1.0
    for layer, rate in sorted(rates.items()):
        if rate < before - 1e-9:
            drops[layer] = before = rate
    return drops
