# SPDX-License-Identifier: Apache-2.0
"""Keep everything: the same cache and attention function with nothing evicted.

``query_rows`` says which rows the vision attention scores of the report are of. Under a ``vision_budget`` old images
fade all the same.
"""

from plphp.errors import ConfigError
from plphp.policy import fading_scores
from plphp.policy.allocation import keep_all
from plphp.policy.method import Method
from plphp.policy.rankers import per_head
from plphp.policy.stages import KVStage
from plphp.settings.config import DEFAULT_RATE, PLPHPConfig

from ._unused import refuse_ranking, refuse_unused


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse a rate, and settings by which entries are ranked."""
    if config.base_rate not in (DEFAULT_RATE, 1.0):
        raise ConfigError(
            f"The method 'none' keeps every vision token, got the rate {config.base_rate:g}: leave it out."
        )
    reason = "keeps every vision token, so that none are ranked"
    refuse_ranking(config, reason)
    if config.vision_budget is None:
        unused = ("exempt_layers", "heads") if config.heads == "ragged" else ("exempt_layers",)
        refuse_unused(config, unused, reason)


METHOD = Method(
    name="none",
    summary="keep every vision token",
    paper="control",
    kv=KVStage(allocate=keep_all, score=per_head, evidence=fading_scores.evidence, fading_score=fading_scores.score),
    check=check,
    when="to see what plphp itself changes: nothing",
)
