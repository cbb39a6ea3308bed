# SPDX-License-Identifier: Apache-2.0
"""Settings that a method has no use for are refused, and not left undone in silence.

Not among them are ``seed``, which a chain and a run of ``plphp eval`` give to all of their methods, and
``calibrated_layers``, which is a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from plphp.errors import ConfigError
from plphp.policy.method import Method
from plphp.settings.config import PLPHPConfig

OF_HEADS = ("heads", "head_safeguard")
"""Settings of the KV heads, each of which only methods of the KV cache let keep its own tokens."""
OF_RANKING = ("gqa_reduction", "score_pool", "image_quota", "min_kept")
"""Settings by which entries are ranked and chosen, beside the query rows that say what the report's scores are of."""
THRESHOLDS = ("attentive_threshold", "indifferent_threshold")


def refuse_unused(config: PLPHPConfig, names: Iterable[str], reason: str) -> None:
    """Raise `ConfigError` for a setting that is not at its default.

    Parameters
    ----------
    config : PLPHPConfig
        Settings of a method that does not look at those of ``names``.
    names : iterable of str
        The settings. ``min_kept=0`` asks for nothing, and passes.
    reason : str
        Why it has no use for them, as a clause whose subject is the method.
    """
    for name in names:
        value = getattr(config, name)
        if value != getattr(PLPHPConfig, name) and (name, value) != ("min_kept", 0):
            raise ConfigError(f"{config.method} {reason}: leave out {name}, got {value!r}.")


def refuse_ranking(config: PLPHPConfig, reason: str) -> None:
    """Refuse the settings of a ranking for a method that ranks nothing but what fades under a ``vision_budget``."""
    of_fading = () if config.vision_budget is None else ("gqa_reduction", "score_pool")
    refuse_unused(config, [name for name in OF_RANKING if name not in of_fading], reason)


def refusing(names: Iterable[str], reason: str) -> Callable[[PLPHPConfig, int], None]:
    """The `plphp.policy.method.Method.check` of a method that does not look at some settings, see `refuse_unused`."""

    def check(config: PLPHPConfig, layers: int) -> None:
        refuse_unused(config, names, reason)

    return check


def refuse_idle(method: Method, config: PLPHPConfig) -> None:
    """Raise `ConfigError` for settings of layer classes and of heads that no part of a method looks at.

    Parameters
    ----------
    method : Method
        The method.
    config : PLPHPConfig
        Its settings, see `plphp.policy.method.Method.settled`.
    """
    if not method.uses_class_rule(config):
        classes = ("retention_delta", *THRESHOLDS, "class_quantile")
        refuse_unused(config, classes, "sorts no layers into classes with these settings")
    elif config.sorts_by_order:
        reason = "goes by the order of the layers, and no thresholds, where target_retention or tiers is given"
        refuse_unused(config, THRESHOLDS, reason)
    else:
        reason = "goes by the order of the layers where target_retention or tiers is given, and here by thresholds"
        refuse_unused(config, ("class_quantile",), reason)
    stage = method.kv
    if stage is None:
        return
    if not (stage.ragged(config) if config.vision_budget is None else stage.fades_ragged(config)):
        reason = "lets all KV heads of a layer keep as many entries, unless heads=ragged says otherwise"
        refuse_unused(config, ("head_safeguard",), reason)
