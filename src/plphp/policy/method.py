# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: a name, and what it does at one or more of the stages at which vision tokens leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plphp.errors import ConfigError
from plphp.settings.checks import check_kept_once
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from .stages import STAGES, AttentionStage, EncoderStage, KVStage, PrefillStage, Stage


@dataclass(frozen=True)
class Method:
    """A way to choose the vision tokens that stay.

    Parameters
    ----------
    name : str
        Name in `PLPHPConfig.method`.
    summary : str
        One line for ``plphp methods``.
    paper : str
        arXiv id with the section or equation, "own", or "control".
    encoder : EncoderStage, optional
        What leaves before the text model.
    prefill : PrefillStage, optional
        What leaves inside prefill.
    attention : AttentionStage, optional
        What attends while a layer reads the prompt.
    kv : KVStage, optional
        What leaves the KV cache after a layer has read the prompt.
    options : mapping of str to Option
        Its own options, given in `PLPHPConfig.options`.
    check : callable
        ``(config, layers) -> None``: raise `ConfigError` for settings that the method cannot meet on a model with
        this number of decoder layers.
    with_bank : callable, optional
        ``(config, file) -> config``: the settings with the query bank of a file, for a method that asks for a bank
        that the engine collects (`plphp.policy.evidence.OwnBank`).
    with_schedule : callable, optional
        ``(config, schedule) -> config``: the settings with the shares of the vision tokens that go on by decoder
        layers, for a method whose schedule is searched for (`plphp.studies.schedule_search`) within its option
        ``tolerance``, and in as many groups of layers as its option ``groups`` says, if it has that.
    tiers : str, optional
        The ladder of a config that names none, for a method that holds entries in few bits in any case. Default: such
        a config holds entries whole, or drops them.
    when : str
        When to take it, for ``plphp methods``, in words that complete "take it".
    """

    name: str
    summary: str
    paper: str
    encoder: EncoderStage | None = None
    prefill: PrefillStage | None = None
    attention: AttentionStage | None = None
    kv: KVStage | None = None
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    check: Callable[[PLPHPConfig, int], None] = lambda config, layers: None
    with_bank: Callable[[PLPHPConfig, str], PLPHPConfig] | None = None
    with_schedule: Callable[[PLPHPConfig, Mapping[int, float]], PLPHPConfig] | None = None
    tiers: str | None = None
    when: str = "to compare"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError(f"The method {self.name!r} acts at no stage: give it one of {', '.join(STAGES)}.")

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that it acts at by name, in the order in which a prompt passes them."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    def acting(self, config: PLPHPConfig) -> dict[str, Stage]:
        """Those of them at which it acts with a config."""
        stages = self.stages
        if self.attention is not None and not self.attention.acts(config):
            del stages["attention"]
        return stages

    def uses_class_rule(self, config: PLPHPConfig) -> bool:
        """Whether it sorts layers into classes by their vision attention scores, see `KVStage`."""
        return self.kv is not None and self.kv.uses_class_rule(config)

    def settled(self, config: PLPHPConfig) -> PLPHPConfig:
        """The config with the method's own ladder, if it names none.

        Raises
        ------
        ConfigError
            If the method has a ladder, and the config says otherwise how much is kept.
        """
        if self.tiers is None or config.tiers is not None:
            return config
        check_kept_once(f"The ladder of the method {self.name!r} ({self.tiers})", config.given_rates)
        return replace(config, tiers=self.tiers)

    def settings(self, config: PLPHPConfig) -> dict[str, Any]:
        """All options by name: those of the config, else the defaults."""
        return settings(self.options, config.options)
