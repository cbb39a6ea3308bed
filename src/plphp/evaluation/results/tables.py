# SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from plphp.evaluation.tasks.task import AnyTask

Figures = Mapping[str, Any]
"""What is said of a variant: intervals and means by their names."""
MIN_METHOD = 20
"""Columns of the terminal that the names of the methods get at least; longer ones are folded."""
FIXED = ("asked", "held")
"""Columns that every part of a table that was cut has."""
NOT_MEASURED = "n/a"
"""What stands in the column ``read`` of a method that recalls, in a mode that does not measure it."""
BORDER = 2
"""Columns of the terminal between two cells, and at both sides of a table."""


def score_tables(metrics: Mapping[str, Any], *, per_task: bool = False, width: int | None = None) -> list[Table]:
    """A table for each group of tasks, with a line per method and retention, and a table of the mean over all groups.

    A group's scores are means over its tasks, those of the last table means over the groups, each with equal weight.
    There is no last table where there is a single group, and no table of a task that is alone in its group.

    Parameters
    ----------
    metrics : mapping
        What `plphp.evaluation.evaluate` returned.
    per_task : bool
        Add a table for each task.
    width : int, optional
        Columns of the terminal: a wider table is cut into several. Default: no limit.
    """
    tables = []
    for group, values in metrics["groups"].items():
        alone = values["tasks"] if len(values["tasks"]) == 1 else []
        about = _about(metrics["tasks"][alone[0]], alone[0]) if alone else f"{len(values['tasks'])} tasks"
        tables += _tables(f"{group}: {about}, {_count(values)}", values["variants"], metrics, width)
        members = [name for name, task in metrics["tasks"].items() if task["group"] == group and name not in alone]
        for name in members if per_task else ():
            task = metrics["tasks"][name]
            tables += _tables(f"{_about(task, name)}, {_count(task)}", task["variants"], metrics, width)
    overall = metrics["overall"]
    if len(overall["groups"]) > 1:
        title = f"overall: mean of {len(overall['groups'])} groups, {_count(overall)}"
        tables += _tables(title, overall["variants"], metrics, width)
    return tables


def task_table(tasks: Iterable[AnyTask]) -> Table:
    """A table of tasks, a line each."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("task", "group", "metric", "chance", "scored", "about"):
        table.add_column(heading, overflow="fold", min_width=len(heading))
    for task in tasks:
        scored = "yes" if task.scored else "no"
        about = (task.name, task.group, task.metric, f"{100 * task.chance:.1f} %", scored, task.summary)
        table.add_row(*map(Text, about))
    return table


def _about(task: Mapping[str, Any], name: str) -> str:
    measured = "" if task["metric"] == "none" else f", {task['metric']}, chance {100 * task['chance']:.0f} %"
    return f"{name}{measured}{'' if task['scored'] else ', not in the mean'}"


def _count(values: Mapping[str, Any]) -> str:
    return f"{values['samples']} samples" + (f", {values['skipped']} skipped" if values["skipped"] else "")


def _tables(title: str, figures: Mapping[str, Figures], metrics: Mapping[str, Any], width: int | None) -> list[Table]:
    """One table, or several with some of the columns each where it would be too wide."""
    columns = _columns(figures, metrics)
    room = math.inf if width is None else width - MIN_METHOD - BORDER - sum(_width(name, columns) for name in FIXED)
    parts: list[list[str]] = [[]]
    taken = 0
    for name in [name for name, cells in columns.items() if any(cells) and name not in FIXED]:
        needed = _width(name, columns)
        if parts[-1] and taken + needed > room:
            parts.append([])
            taken = 0
        parts[-1].append(name)
        taken += needed
    titles = [title, *(f"{title} (further columns)" for _ in parts[1:])]
    methods = _methods(metrics["variants"])
    return [
        _table(shown, methods, {name: columns[name] for name in (*FIXED, *part)})
        for shown, part in zip(titles, parts, strict=True)
    ]


def _columns(figures: Mapping[str, Figures], metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """Cells of every column except the method, in the order of the variants."""
    baseline, variants = metrics["baseline"], metrics["variants"]
    lines = [figures[variant["name"]] for variant in variants]
    return {
        "asked": ["" if rate is None else f"{100 * rate:g}" for rate in (variant["retention"] for variant in variants)],
        "held": [f"{100 * line['kept']:.1f}" for line in lines],
        "read": [_read(line) for line in lines] if any("read" in line for line in lines) else [],
        "vision": [f"{100 * line['vision_kept']:.1f}" if "vision_kept" in line else "" for line in lines],
        "score (95 %)": [_interval(line, "score", "") for line in lines],
        "- full": [_interval(line, "vs_full", "+") for line in lines],
        **({f"- {baseline}": [_interval(line, "vs_baseline", "+") for line in lines]} if baseline else {}),
        "agree": [f"{100 * line['agreement']:.1f}" if "agreement" in line else "" for line in lines],
        "KL": [f"{line['kl']:.4f}" if "kl" in line else "" for line in lines],
    }


def _read(line: Figures) -> str:
    """What a step reads where it is less than is held or was not measured."""
    if "read" not in line:
        return NOT_MEASURED
    return "" if math.isclose(line["read"], line["kept"], abs_tol=1e-6) else f"{100 * line['read']:.1f}"


def _methods(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """The label of each variant, empty where it is that of the line before."""
    labels = [variant["label"] for variant in variants]
    return ["" if label == before else label for before, label in zip([None, *labels], labels, strict=False)]


def _width(name: str, columns: Mapping[str, Sequence[str]]) -> int:
    """Columns of the terminal that a column of the table takes, with its padding and border."""
    return max(map(cell_len, (name, *columns[name]))) + BORDER


def _table(title: str, methods: Sequence[str], columns: Mapping[str, Sequence[str]]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", min_width=8, overflow="fold")
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for method, *cells in zip(methods, *columns.values(), strict=True):
        table.add_row(Text(method), *cells)
    return table


def _interval(figures: Figures, name: str, sign: str) -> str:
    if name not in figures:
        return ""
    mean, low, high = (100 * figures[name][key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} ({low:.1f}, {high:.1f})"
