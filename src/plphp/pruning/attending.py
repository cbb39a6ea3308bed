# SPDX-License-Identifier: Apache-2.0
"""The tokens of a prompt that attend in each layer, where attention runs among important tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from plphp.families.spans import VisionSpans, query_mask
from plphp.policy.chain import Link
from plphp.policy.evidence import LayerScores
from plphp.policy.stages import AttentionStage

from .leaving_checks import check_mask
from .left_tokens import AttendedTokens
from .packing import Packing
from .scoring import Attended


@dataclass
class Attending:
    """The tokens that attend in each layer of one prompt, which comes in one piece.

    Parameters
    ----------
    spans : VisionSpans
        Where its vision tokens are.
    link : Link of AttentionStage
        Says which of them are important.
    """

    spans: VisionSpans
    link: Link[AttentionStage]
    _attended: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer, the tokens of the pass that it had and those that attended, bool [batch, tokens]."""

    def choose(self, attended: Attended, scores: LayerScores, unranked: Sequence[int]) -> Packing | None:
        """Say which tokens of a layer attend.

        Parameters
        ----------
        attended : Attended
            The layer, before its attention, with all tokens of the pass that it has.
        scores : LayerScores
            Its scores.
        unranked : sequence of int
            Rows that cannot be ranked; all of their tokens attend.

        Returns
        -------
        Packing or None
            Of the tokens that the layer has, those that attend; None where they all do.

        Raises
        ------
        ConfigError
            If the method gives no mask of them.
        """
        important = self.link.stage.important(scores, self.link.config)
        check_mask(self.link.method, important, tuple(scores.segment.shape))
        stay = ~scores.vision | important
        stay[list(unranked)] = True
        # An answer may stand before the prompt in the tail: the tokens of this pass are its last.
        own, tokens = attended.query.shape[2], attended.entries.tail_tokens
        last = tokens.of(query_mask(self.spans, 1), False)[:, -own:]
        there = scores.valid[:, -own:].cpu()
        stay = there & (stay[:, -own:].cpu() | last)
        packing = attended.entries.packing
        masks = (there, stay) if packing is None else (packing.spread(there, False), packing.spread(stay, False))
        self._attended[attended.layer] = masks
        return None if bool((stay | ~there).all()) else Packing.of(stay)

    def noted(self) -> AttendedTokens:
        """What is kept for a report."""
        return AttendedTokens(self.link.method, self._attended)

    def repeat(self, times: int) -> None:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        self.spans = self.spans.repeated(times)
