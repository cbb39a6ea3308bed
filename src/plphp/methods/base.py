# SPDX-License-Identifier: Apache-2.0
"""What a pruning method is: an allocator for the layer level and a ranker for the head level."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation import Allocator
from ..config import PLPHPConfig
from ..selection import Ranker


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
        Layer level: vision attention scores to retention rates, see `plphp.allocation`.
    rank : Ranker
        Head level: a score for every entry of every KV head, see `plphp.selection`.
    uses_class_rule : bool
        Whether ``target_retention`` sorts the layers of a prompt by their scores, so that none may be compacted
        before all have been scored.
    """

    name: str
    summary: str
    paper: str
    allocate: Allocator
    rank: Ranker
    uses_class_rule: bool = False

    def needs_all_layers(self, config: PLPHPConfig) -> bool:
        """Whether the rates of any layer depend on the scores of all."""
        return self.uses_class_rule and config.target_retention is not None
