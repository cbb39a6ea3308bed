# SPDX-License-Identifier: Apache-2.0
"""What left before decoder layers got it, and what attended in each of them, in a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .report_checks import integers


@dataclass(frozen=True)
class StageReport:
    """Vision tokens that left a prompt before a decoder layer.

    Parameters
    ----------
    stage : str
        "encoder" or "prefill".
    method : str
        Name of the method that chose.
    layer : int
        The first decoder layer without them.
    tokens_in : list of int
        Per row, the vision tokens that were there before.
    positions : list of list of int
        Per row, the logical positions of those that stay.
    """

    stage: str
    method: str
    layer: int
    tokens_in: list[int]
    positions: list[list[int]]

    @property
    def tokens_out(self) -> list[int]:
        """Per row, the vision tokens that stay."""
        return [len(row) for row in self.positions]

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> StageReport:
        """Read one of a report in JSON.

        Raises
        ------
        TypeError, KeyError
            If it is none.
        """
        stage = cls(**values)
        for row in (stage.tokens_in, *stage.positions):
            integers(row, "tokens_in and positions")
        return stage


@dataclass(frozen=True)
class AttentionReport:
    """Tokens that attended while a decoder layer read a prompt, where attention ran among important tokens alone.

    Parameters
    ----------
    layer : int
        The decoder layer.
    method : str
        Name of the method that chose.
    computed : list of int
        Per row, the tokens that the layer computed, without padding.
    attended : list of int
        Per row, how many of them attended.
    positions : list of list of int
        Per row, the logical positions of the vision tokens among these.
    """

    layer: int
    method: str
    computed: list[int]
    attended: list[int]
    positions: list[list[int]]

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> AttentionReport:
        """Read one of a report in JSON.

        Raises
        ------
        TypeError, KeyError
            If it is none.
        """
        report = cls(**values)
        for row in (report.computed, report.attended, *report.positions):
            integers(row, "computed, attended and positions")
        return report
