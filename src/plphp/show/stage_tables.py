# SPDX-License-Identifier: Apache-2.0
"""What left a prompt before decoder layers got it, stage by stage, as a table, in words and as values for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .prefill_table import prefill_table

if TYPE_CHECKING:
    from rich.table import Table

    from plphp.pruning.prompt_report import PromptReport
    from plphp.pruning.report import PruneReport
    from plphp.pruning.stage_report import StageReport


def where(layer: int) -> str:
    """Where the tokens left that a layer is the first without."""
    return f"before layer {layer}" if layer else "before the text model"


def stage_table(prompt: PromptReport, row: int = 0) -> Table | None:
    """Table of the stages before the KV cache; None where nothing left before layers got it.

    Parameters
    ----------
    prompt : PromptReport
        The prompt.
    row : int
        Row of the batch, which must be there. The tokens that were computed are those of all rows.
    """
    if not prompt.stages:
        return None
    words, counts = ("stage", "method", "left"), ("vision tokens", "stay", "share")
    table = prefill_table("what layers did not get", _computed(prompt), words, counts)
    for stage in prompt.stages:
        came, stay = stage.tokens_in[row], stage.tokens_out[row]
        share = f"{stay / came:.0%}" if came else ""
        table.add_row(stage.stage, stage.method, where(stage.layer), str(came), str(stay), share)
    return table


def stages_line(report: PruneReport) -> str:
    """What left before layers got it, over the rows and prompts of a report; "" where nothing did.

    As in "196 -> 98 vision tokens before the text model (divprune) -> 33 before layer 2 (fastv)".
    """
    by_stage: dict[tuple[int, str], list[StageReport]] = {}
    for stage in (stage for prompt in report.prompts for stage in prompt.stages):
        by_stage.setdefault((stage.layer, stage.method), []).append(stage)
    parts: list[str] = []
    for (layer, method), stages in sorted(by_stage.items()):
        came = sum(sum(stage.tokens_in) for stage in stages)
        stay = sum(sum(stage.tokens_out) for stage in stages)
        tokens = f" -> {stay}" if parts else f"{came} -> {stay} vision tokens"
        parts.append(f"{tokens} {where(layer)} ({method})")
    if not parts:
        return ""
    return f"{''.join(parts)}, {report.computed_share:.0%} of all tokens x layers computed"


def stage_values(prompt: PromptReport) -> dict[str, Any]:
    """What left before layers got it, as JSON-ready values, without positions."""
    return {
        "stages": [
            {
                "stage": stage.stage,
                "method": stage.method,
                "layer": stage.layer,
                "tokens_in": stage.tokens_in,
                "tokens_out": stage.tokens_out,
            }
            for stage in prompt.stages
        ],
        "computed": prompt.computed,
        "computed_share": prompt.computed_share,
    }


def _computed(prompt: PromptReport) -> str:
    shown = f"{sum(prompt.computed):,} of {prompt.all_computed:,} tokens x layers computed"
    return f"{shown} ({prompt.computed_share:.0%})"
