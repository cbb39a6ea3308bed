# SPDX-License-Identifier: Apache-2.0
"""Nothing is dropped and nothing chosen: every vision entry in the same few bits. The control of eviction.

A method that drops entries, or gives some more bits than others, has to lose less than this one does with as many
bytes. The ladder is one rung that takes all: ``c3`` (3 bits), unless the config says otherwise, as in
``quantized:tiers=kivi2``. No entry is better than another, so that the score is constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy import fading_scores
from plphp.policy.allocation import uniform
from plphp.policy.evidence import LayerScores
from plphp.policy.method import Method
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.ladder import WHOLE

from ._unused import refuse_ranking, refuse_unused

if TYPE_CHECKING:
    from torch import Tensor


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """0 for every entry; float32 [batch, kv_heads, seq]."""
    batch, _, seq = scores.attention.shape
    return scores.attention.new_zeros(()).expand(batch, scores.kv_heads, seq)


def check(config: PLPHPConfig, layers: int) -> None:
    """One rung of few bits takes everything: with several, constant scores would deal entries out by their position."""
    reason = "holds every vision entry alike, so that none are ranked"
    refuse_unused(config, ("query_rows",), reason)
    refuse_ranking(config, reason)
    if config.ladder is None or len(config.ladder.names) > 1 or config.ladder.kept < 1:
        raise ConfigError(
            f"The method 'quantized' holds every vision entry in one rung, got tiers={config.tiers}: name one, such as "
            "tiers=c3, or take a method that chooses, such as query_bank."
        )
    if config.ladder.names == (WHOLE,):
        raise ConfigError(
            f"The method 'quantized' holds every vision entry in few bits, and tiers={config.tiers} holds it in the "
            "dtype of the model, so that nothing would change: take the method 'none', or a rung such as tiers=c3."
        )


METHOD = Method(
    name="quantized",
    summary="every vision token in the same few bits, none dropped and none chosen",
    paper="control: bits as in KIVI, arXiv:2402.02750",
    kv=KVStage(
        allocate=uniform,
        score=score,
        evidence=fading_scores.evidence,
        heads_compare=False,
        fading_score=fading_scores.score,
    ),
    check=check,
    tiers="c3",
    when="without a bank, and as the control that a method which drops tokens has to beat with as many bytes",
)
