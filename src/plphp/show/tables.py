# SPDX-License-Identifier: Apache-2.0
"""Reports and comparisons as tables for a terminal, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from plphp.errors import ConfigError

from .attention_tables import attention_line, attention_table, attention_values
from .memory_table import memory_line, memory_table
from .quantities import human_bytes
from .stage_tables import stage_table, stage_values, stages_line

if TYPE_CHECKING:
    from plphp.pruning.prompt_report import PromptReport, RowReport
    from plphp.pruning.report import BankProgress, PruneReport
    from plphp.studies.compare import Comparison

TOTALS = (
    *("entry_bytes", "read_bytes", "device_bytes", "rung_bytes", "kv_reduction", "retention", "vision_held"),
    "vision_bytes",
    "computed_share",
    "attended_share",
)
"""Properties of a report that stand beside its fields in JSON."""
MAX_HEADS = 8
"""Heads whose counts are spelled out; beyond it a range is shown."""


def select_prompt(report: PruneReport, prompt: int = 0, row: int = 0) -> PromptReport:
    """Return a prompt of a report, after a check that the report has the row.

    Raises
    ------
    ConfigError
        If the report has no such prompt or row.
    """
    if not report.prompts:
        raise ConfigError("The report holds no pruned prompt: the prompt had no vision tokens.")
    if not 0 <= prompt < len(report.prompts):
        raise ConfigError(f"The report has the prompts 0 to {len(report.prompts) - 1}, not {prompt}.")
    if not 0 <= row < report.batch:
        raise ConfigError(f"The report has the rows 0 to {report.batch - 1}, not {row}.")
    return report.prompts[prompt]


def layer_rows(report: PruneReport, prompt: int = 0, row: int = 0) -> list[tuple[int, RowReport]]:
    """Return layer numbers with what each layer kept of a row of a prompt.

    Raises
    ------
    ConfigError
        If the report has no such prompt or row.
    """
    return [(layer.layer, layer.rows[row]) for layer in select_prompt(report, prompt, row).layers]


def layer_tables(report: PruneReport, row: int = 0) -> list[Table]:
    """Make a `layer_table` for each pruned prompt, behind those of what left before layers got it and of what attended
    in them, where it was not all; and behind all of them a `memory_table` where there is a budget.

    Empty where no prompt had vision tokens.
    """
    tables: list[Table | None] = []
    for prompt in range(len(report.prompts)):
        selected = select_prompt(report, prompt, row)
        tables += stage_table(selected, row), attention_table(selected, row), layer_table(report, prompt, row)
    tables.append(memory_table(report))
    return [table for table in tables if table is not None]


def layer_table(report: PruneReport, prompt: int = 0, row: int = 0) -> Table:
    """Table of the layers: vision attention score, class, retention rate, tokens kept per KV head.

    Where text may leave, the rate says how much memory is left, and the share of the vision entries stands beside it.
    With tiers the bytes that hold the vision tokens stand there, and how many of them are in which rung.

    Parameters
    ----------
    report : PruneReport
        Report of a run.
    prompt, row : int
        Which prompt (turn) and which row of the batch.

    Raises
    ------
    ConfigError
        If the report has no such prompt or row.
    """
    rows = layer_rows(report, prompt, row)
    table = Table(title=_layer_title(report, prompt, row, rows[0][1].vision_tokens if rows else 0))
    text_may_leave = any(layer.evicted_text for _, layer in rows)
    rungs = list(dict.fromkeys(tier.rung for _, layer in rows for tier in layer.tiers))
    whole = rungs and any(any(layer.whole) for _, layer in rows)
    headings = ["layer", "vision attention", "class", "rate", *(("of vision",) if text_may_leave else ())]
    headings += ["held", *(["whole"] if whole else []), *rungs] if rungs else ["kept per KV head"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "class" else "right", overflow="fold")
    for number, layer in rows:
        cells = [str(number), f"{layer.vision_score:.3f}", layer.layer_class, f"{layer.rate:.2f}"]
        cells += [f"{layer.vision_kept:.2f}"] if text_may_leave else []
        if rungs:
            entries = {tier.rung: tier.entries for tier in layer.tiers}
            by_rung = [_counts(entries[name]) if name in entries else "" for name in rungs]
            cells += [f"{layer.vision_held:.1%}", *([_counts(layer.whole)] if whole else []), *by_rung]
        else:
            cells += [_counts(layer.kept)]
        table.add_row(*cells)
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Table of both answers side by side, with KV bytes, the time to the first token and decode time per token."""
    table = Table(show_lines=True)
    table.add_column("")
    for heading in ("unpruned", "pruned"):
        table.add_column(heading, overflow="fold", ratio=1)
    # Answers are the model's words: as Text, so that their brackets are not taken for markup.
    table.add_row("answer", *(Text("\n".join(run.texts)) for run in (comparison.unpruned, comparison.pruned)))
    for row in comparison_rows(comparison):
        table.add_row(*row)
    table.add_row("same tokens", "", "yes" if comparison.same_tokens else "no")
    return table


def comparison_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """What both answers took: the name of each figure, its value unpruned, and pruned."""
    unpruned, pruned = comparison.unpruned, comparison.pruned
    speedup = f" (x {comparison.speedup:.2f})" if comparison.speedup else ""
    held = f"{human_bytes(pruned.kv_bytes)} ({_change(comparison.report)})"
    return [
        (f"KV cache of {comparison.report.tokens} tokens", human_bytes(unpruned.kv_bytes), held),
        ("first token", _milliseconds(unpruned.prefill_seconds), _milliseconds(pruned.prefill_seconds)),
        (
            "decode per token",
            _milliseconds(unpruned.seconds_per_token),
            _milliseconds(pruned.seconds_per_token) + speedup,
        ),
    ]


def comparison_values(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON-ready values, with the totals of its report."""
    return {
        **{name: dataclasses.asdict(getattr(comparison, name)) for name in ("unpruned", "pruned")},
        "same_tokens": comparison.same_tokens,
        "kv_reduction": comparison.kv_reduction,
        "speedup": comparison.speedup,
        "report": report_values(comparison.report),
    }


def report_values(report: PruneReport) -> dict[str, Any]:
    """Return the totals of a report as JSON-ready values, without the kept positions."""
    values = {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.name not in ("prompts", "collecting", "held", "images")
    }
    values["held"] = [dataclasses.asdict(layer) for layer in report.held]
    values["images"] = [image.values() for image in report.images]
    values["collecting"] = None if report.collecting is None else dataclasses.asdict(report.collecting)
    prompts = [
        {
            "start": prompt.start,
            "end": prompt.end,
            **stage_values(prompt),
            **attention_values(prompt),
            "layers": [
                {"layer": layer.layer, "rows": [_row_values(row) for row in layer.rows]} for layer in prompt.layers
            ],
        }
        for prompt in report.prompts
    ]
    return {**values, **{name: getattr(report, name) for name in TOTALS}, "prompts": prompts}


def summary(report: PruneReport, earlier_seconds: float = 0.0) -> str:
    """Line on a report: KV bytes of the tokens seen so far, what is held of the images, time spent on pruning.

    Parameters
    ----------
    report : PruneReport
        Report of a run.
    earlier_seconds : float
        Of the time spent on pruning, what was spent before the turn that the line is on.
    """
    reserved = f" and {human_bytes(report.reserved_bytes)} of reserved room" if report.reserved_bytes else ""
    kept = f"{report.retention:.0%} of the vision entries kept" if report.prompts else "no vision tokens"
    if report.rung_bytes:
        kept += f" in {report.vision_held:.1%} of their bytes ({', '.join(report.rung_bytes)})"
    if report.config.get("read", 1.0) < 1:
        kept += f", a step reads at most {human_bytes(report.read_bytes)}"
    if report.budget_bytes:
        kept += f", {memory_line(report)}"
    if report.text_evicted:
        kept += f" and {report.text_evicted} text entries evicted"
    where = f"{reserved}{_devices(report)}"
    milliseconds = 1000 * (report.pruning_seconds - earlier_seconds)
    early = "".join(f"{line}, " for line in (stages_line(report), attention_line(report)) if line)
    return (
        f"KV cache of {report.tokens} tokens {human_bytes(report.kv_bytes_full)} -> {human_bytes(report.entry_bytes)} "
        f"({_change(report)}){where}, {early}{kept}, pruning took {milliseconds:.1f} ms, the "
        "first use of its operations included"
    )


def collecting_line(progress: BankProgress, folder: str) -> str:
    """Line on an answer that is not pruned, as there is no query bank yet.

    Parameters
    ----------
    progress : BankProgress
        How far the bank is.
    folder : str
        Folder that keeps it; "" for none.
    """
    bank = f"This answer is not pruned: the query bank is of {progress.collected} of {progress.wanted} prompts now"
    if folder:
        where = f"which {folder} keeps"
        return f"{bank}, {where}; {f'{progress.missing} more to go' if progress.missing else 'the next is pruned'}."
    return f"{bank}, and nothing is kept: name a folder for it (folder=DIR), or a bank (bank=FILE, see plphp collect)."


def _change(report: PruneReport) -> str:
    """The change of the bytes in per cent, as in "-45%"; without a sign where there is none."""
    return f"{-report.kv_reduction:+.0%}" if report.kv_reduction else "0%"


def _devices(report: PruneReport) -> str:
    """The bytes of each device where there are several, as in ", 1.0 GiB on cuda:0 and 2.0 GiB on cuda:1"."""
    parts = [f"{human_bytes(nbytes)} on {device}" for device, nbytes in report.device_bytes.items()]
    return f", {' and '.join(parts)}" if len(parts) > 1 else ""


def _row_values(row: RowReport) -> dict[str, Any]:
    return {
        "vision_score": row.vision_score,
        "layer_class": row.layer_class,
        "rate": row.rate,
        "vision_tokens": row.vision_tokens,
        "kept": row.kept,
        "vision_kept": row.vision_kept,
        "vision_held": row.vision_held,
        "tiers": {tier.rung: {"entries": tier.entries, "nbytes": tier.nbytes} for tier in row.tiers},
        "means_bytes": row.means_bytes,
        "text_evicted": [len(head) for head in row.evicted_text],
    }


def _layer_title(report: PruneReport, prompt: int, row: int, tokens: int) -> str:
    parts = [f"{_methods(report.config)}: {tokens} vision tokens"]
    parts += [f"prompt {prompt}"] if len(report.prompts) > 1 else []
    parts += [f"row {row}"] if report.batch > 1 else []
    return ", ".join(parts)


def _counts(kept: list[int]) -> str:
    """Tokens kept per KV head in a few words, as in "8 x 64" where all heads keep the same number."""
    if len(set(kept)) == 1 and len(kept) > 1:
        return f"{len(kept)} x {kept[0]}"
    if len(kept) <= MAX_HEADS:
        return " ".join(map(str, kept))
    return f"{min(kept)} to {max(kept)}, mean {sum(kept) / len(kept):.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f} ms"


def _methods(config: Mapping[str, Any]) -> str:
    """The methods of a run in their order, as they are written on a line."""
    return "+".join(part.get("method", "") for part in (*config.get("earlier", ()), config))
