# SPDX-License-Identifier: Apache-2.0
"""What is noted of a prompt whose layers did not get, or did not attend among, all of its tokens.

It is of the prompt's own tokens alone, so that it grows with a conversation and not with its square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from plphp.families.prompt_spans import PromptSpans

from .packing import Packing
from .stage_report import AttentionReport, StageReport


@dataclass(frozen=True)
class LeftTokens:
    """What left a prompt before layers got it.

    Parameters
    ----------
    methods : mapping of str to str
        By stage, ``encoder`` and ``prefill``, what chose.
    packings : mapping of int to Packing
        By the layer before which tokens left, those that stayed.
    computed : mapping of int to int
        By decoder layer, the tokens that it has computed, over the rows.
    """

    methods: Mapping[str, str]
    packings: Mapping[int, Packing]
    computed: Mapping[int, int]

    def report(self, spans: PromptSpans) -> list[StageReport]:
        """What left, in the order of the layers."""
        reports, before = [], spans.vision
        for first, packing in sorted(self.packings.items()):
            stage = "prefill" if first else "encoder"
            stay = spans.vision & packing.stay
            reports.append(
                StageReport(stage, self.methods[stage], first, before.sum(1).tolist(), spans.positions(stay))
            )
            before = stay
        return reports


@dataclass(frozen=True)
class AttendedTokens:
    """The tokens of a prompt among which layers attended.

    Parameters
    ----------
    method : str
        What chose.
    layers : mapping of int to tuple of Tensor
        By layer, the tokens that it had and those that attended, bool [batch, tokens].
    """

    method: str
    layers: Mapping[int, tuple[Tensor, Tensor]]

    def report(self, spans: PromptSpans) -> list[AttentionReport]:
        """What attended, in the order of the layers that have run."""
        return [
            AttentionReport(
                layer,
                self.method,
                there.sum(1).tolist(),
                stay.sum(1).tolist(),
                spans.positions(spans.vision & stay),
            )
            for layer, (there, stay) in sorted(self.layers.items())
        ]
