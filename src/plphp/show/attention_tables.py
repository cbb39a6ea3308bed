# SPDX-License-Identifier: Apache-2.0
"""What attended while layers read a prompt, as a table, in words and as values for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .prefill_table import prefill_table

if TYPE_CHECKING:
    from rich.table import Table

    from plphp.pruning.prompt_report import PromptReport
    from plphp.pruning.report import PruneReport


def attention_table(prompt: PromptReport, row: int = 0) -> Table | None:
    """Table of the layers in which not all tokens attended; None where attention of the prompt was the model's own.

    Parameters
    ----------
    prompt : PromptReport
        The prompt.
    row : int
        Row of the batch, which must be there. The tokens x layers below are those of all rows.
    """
    if not prompt.attention:
        return None
    attended, computed = prompt.attended, prompt.attention_computed
    caption = f"{attended:,} of {computed:,} tokens x layers attended ({prompt.attended_share:.0%})"
    table = prefill_table("what attended in prefill", caption, ("layer", "method"), ("tokens", "attended", "share"))
    for layer in prompt.attention:
        tokens, those = layer.computed[row], layer.attended[row]
        table.add_row(str(layer.layer), layer.method, str(tokens), str(those), f"{those / tokens:.0%}")
    return table


def attention_line(report: PruneReport) -> str:
    """Which share of the tokens x layers attended, over the rows and prompts of a report; "" where all did in any case.

    As in "52% of tokens x layers attended in prefill (zipvl)".
    """
    methods = sorted({layer.method for prompt in report.prompts for layer in prompt.attention})
    if not methods:
        return ""
    return f"{report.attended_share:.0%} of tokens x layers attended in prefill ({', '.join(methods)})"


def attention_values(prompt: PromptReport) -> dict[str, Any]:
    """What attended, as JSON-ready values, without positions."""
    return {
        "attention": [
            {"layer": layer.layer, "method": layer.method, "computed": layer.computed, "attended": layer.attended}
            for layer in prompt.attention
        ],
        "attended_share": prompt.attended_share,
    }
