# SPDX-License-Identifier: Apache-2.0
"""What the worker reports to the scheduler of a prompt that was pruned."""

from __future__ import annotations

from dataclasses import dataclass, field

from plphp.policy.allocation import RowAllocation


@dataclass
class PrunedPrompt:
    """What is left of one prompt.

    Parameters
    ----------
    tokens, vision_tokens : int
        Length of the prompt, and how many of its tokens are vision tokens.
    allocation : dict of int to RowAllocation
        By decoder layer, what the layer level decided.
    kept : dict of int to float
        By decoder layer, the vision tokens that a KV head keeps, the mean over the heads.
    blocks : dict of int to int
        By decoder layer, the blocks at the head of the prompt that fell empty.
    """

    tokens: int
    vision_tokens: int
    allocation: dict[int, RowAllocation] = field(default_factory=dict)
    kept: dict[int, float] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, allocation: RowAllocation, kept: float, blocks: int) -> None:
        """Note down a layer."""
        self.allocation[layer], self.kept[layer], self.blocks[layer] = allocation, kept, blocks

    @property
    def retention(self) -> float:
        """Fraction of the vision entries that is kept, the mean over the layers that were pruned."""
        return sum(self.kept.values()) / (self.vision_tokens * len(self.kept)) if self.kept else 1.0
