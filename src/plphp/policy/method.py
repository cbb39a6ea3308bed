# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: an allocator for the layer level and a ranker for the head level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from .allocation import Allocator
from .evidence import Evidence
from .rankers import Ranker
from .selection import Mix

if TYPE_CHECKING:
    pass
from .stages import PromptStage


@dataclass(frozen=True)
class Method:
    """A way to choose the vision tokens that stay in the KV cache after prefill.

    Parameters
    ----------
    name : str
        Name in `PLPHPConfig.method`.
    summary : str
        One line for ``plphp methods``.
    paper : str
        arXiv id with the section or equation, or "control".
    allocate : Allocator
        Layer level: scored layers to retention rates, see `plphp.policy.allocation`.
    rank : Ranker
        Head level: a score for every entry of every KV head, see `plphp.policy.selection`.
    uses_class_rule : callable
        ``config -> bool``: whether the allocator sorts layers into classes by their vision attention scores. Then
        ``target_retention`` says how much is kept, and none may be compacted before all have been scored.
    options : mapping of str to Option
        Its own options, given in `PLPHPConfig.options`.
    evidence : callable
        ``config -> Evidence``: what it wants to know of a layer beside the mean attention.
    all_layers : callable
        ``config -> bool``: whether the rates of any layer depend on the scores of all, for another reason than
        ``uses_class_rule``.
    mix : callable
        ``config -> Mix``: which part of each head's places does not go by rank.
    stage : PromptStage, optional
        For a method that acts inside prefill; then ``rank`` is not used.
    check : callable
        ``(config, layers) -> None``: raise `ConfigError` for settings that the method cannot meet on a model with
        this number of decoder layers.
    needs_answer : bool
        Whether it ranks by the queries of the answer, which only `plphp.branch` has.
    """

    name: str
    summary: str
    paper: str
    allocate: Allocator
    rank: Ranker
    uses_class_rule: Callable[[PLPHPConfig], bool] = lambda config: False
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    evidence: Callable[[PLPHPConfig], Evidence] = lambda config: Evidence()
    all_layers: Callable[[PLPHPConfig], bool] = lambda config: False
    mix: Callable[[PLPHPConfig], Mix] = lambda config: Mix()
    stage: PromptStage | None = None
    check: Callable[[PLPHPConfig, int], None] = lambda config, layers: None
    needs_answer: bool = False

    def needs_all_layers(self, config: PLPHPConfig) -> bool:
        """Whether the rates of any layer depend on the scores of all."""
        return (config.target_retention is not None and self.uses_class_rule(config)) or self.all_layers(config)

    def settings(self, config: PLPHPConfig) -> dict[str, Any]:
        """All options by name: those of the config, else the defaults."""
        return settings(self.options, config.options)
