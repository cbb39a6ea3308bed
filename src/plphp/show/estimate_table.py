# SPDX-License-Identifier: Apache-2.0
"""An estimate as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table

from .quantities import human_bytes

if TYPE_CHECKING:
    from plphp.studies.estimate import Estimate


def estimate_table(title: str, unpruned: Estimate, pruned: Estimate) -> Table:
    """Table of both estimates side by side, with their ratios."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    asked = f"retention {pruned.retention:g}" if pruned.tiers is None else f"tiers {pruned.tiers}"
    asked += f", {pruned.read:g} read" if pruned.read < 1 else ""
    asked += f", encoder {pruned.encoder_retention:g}" if pruned.encoder_retention < 1 else ""
    asked += f", prefill {pruned.prefill}" if pruned.prefill is not None else ""
    asked += f", attention {pruned.attention_retention:g}" if pruned.attention_retention < 1 else ""
    for heading in ("everything kept", asked, "ratio"):
        table.add_column(heading, justify="right")
    lines: list[tuple[str, str, Callable[[float], str]]] = [
        ("KV cache of a sequence", "sequence_kv_bytes", human_bytes),
        ("KV cache of the batch", "kv_bytes", human_bytes),
        ("weights and KV cache", "memory_bytes", human_bytes),
        ("read in a decoding step", "step_bytes", human_bytes),
        ("tokens x layers of prefill", "computed", lambda count: f"{count:,.0f}"),
        ("prefill at least, text model", "prefill_flops", human_flops),
        ("prefill at least, vision tower", "tower_flops", human_flops),
        ("first token takes at least", "first_token_seconds", _milliseconds),
    ]
    if pruned.book_bytes:
        lines.insert(2, ("codebooks of the model", "book_bytes", human_bytes))
    if unpruned.fits is not None:
        lines += [
            ("step takes at least", "step_seconds", _milliseconds),
            ("tokens per second at most", "tokens_per_second", lambda rate: f"{rate:,.0f}"),
            ("largest batch", "largest_batch", lambda batch: f"{batch:,.0f}"),
            ("tokens per second with it", "most_tokens_per_second", lambda rate: f"{rate:,.0f}"),
        ]
    for text, name, shown in lines:
        before, after = getattr(unpruned, name), getattr(pruned, name)
        if before is None:
            continue
        table.add_row(text, shown(before), shown(after), f"{after / before:.2f}" if before else "")
    if unpruned.fits is not None:
        table.add_row("the batch fits", *("yes" if each.fits else "no" for each in (unpruned, pruned)), "")
    return table


def human_flops(count: float) -> str:
    """Return a number of floating-point operations with a decimal unit.

    Examples
    --------
    >>> human_flops(512), human_flops(1.5e9), human_flops(2.25e15)
    ('512 FLOP', '1.5 GFLOP', '2250.0 TFLOP')
    """
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if count < 1000:
            return f"{count:.0f} FLOP" if unit == "FLOP" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TFLOP"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
