# SPDX-License-Identifier: Apache-2.0
"""Better evidence than the last row: the best position that any row of the question gives a token. Our own; no paper.

The last prompt token ranks what the answer says *first*. Over the rows t of the text after the last image, the last
one among them, with A the softmax attention of a KV head (query heads combined by ``gqa_reduction``):

    best[j] = min over t of the position of j in the order among the vision tokens by A[t, j], from 0
    s[j]    = 1 / (1 + best[j])        times ||v_j|| with ``value_norm=1``

so a token that one word of the question looks for is kept, however little the others attend to it. Tokens with the
same best position are told apart by their mean attention: ``1 + best`` becomes ``2 + best - mean[j] / max(mean)``.

Options: ``floor`` is the share of each head's places that is spread evenly over what the ranking leaves of the
images, ``random_share`` the share that is drawn from it at random (before the spread), ``layers`` how rates are
allocated: the same for all, or by PLPHP's classes. Choosing defaults by evidence is the benchmark's part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.allocation import Allocation, Layers, by_vision_attention, uniform
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.rankers import by_best_position, times_value_norm
from plphp.policy.selection import Mix
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {
    "value_norm": Option(0, low=0, high=1),
    "floor": Option(0.0, low=0, high=1),
    "random_share": Option(0.0, low=0, high=1),
    "layers": Option("uniform", choices=("uniform", "vision_attention")),
}


def evidence(config: PLPHPConfig) -> Evidence:
    """Best positions over the question, and norms if they are to count."""
    weighted = settings(OPTIONS, config.options)["value_norm"] == 1
    return Evidence(rows="text", best_position=True, value_norm=weighted)


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """The score s of the module's docstring."""
    return times_value_norm(by_best_position(scores, config), scores)


def by_classes(config: PLPHPConfig) -> bool:
    """Whether layers are sorted by their vision attention."""
    return bool(settings(OPTIONS, config.options)["layers"] == "vision_attention")


def allocate(layers: Layers, config: PLPHPConfig) -> Allocation:
    """By the option ``layers``."""
    return by_vision_attention(layers, config) if by_classes(config) else uniform(layers, config)


def mix(config: PLPHPConfig) -> Mix:
    """By the options ``random_share`` and ``floor``."""
    options = settings(OPTIONS, config.options)
    return Mix(random=options["random_share"], spread=options["floor"])


def check(config: PLPHPConfig, layers: int) -> None:
    """The shares are parts of one whole."""
    parts = mix(config)
    if parts.random + parts.spread > 1 + 1e-9:
        raise ConfigError(
            f"recall_rank's floor and random_share must be at most 1 together, got {parts.spread} and {parts.random}."
        )


METHOD = Method(
    name="recall_rank",
    summary="every KV head keeps what any word of the question ranks high",
    paper="own: evidence of arXiv:2502.14504 widened to all rows of the question",
    kv=KVStage(
        allocate=allocate,
        score=score,
        evidence=evidence,
        uses_class_rule=by_classes,
        at_most=by_vision_attention,
        mix=mix,
    ),
    options=OPTIONS,
    check=check,
)
