# SPDX-License-Identifier: Apache-2.0
"""Figures of an evaluation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .settings import AnyTask

Figures = Mapping[str, Any]


def score_tables(metrics: Mapping[str, Any], *, per_task: bool = False) -> list[Table]:
    """A table for each group of tasks: a line per method and retention.

    Parameters
    ----------
    metrics : mapping
        What `plphp.evaluation.evaluate` returned.
    per_task : bool
        Add a table for each task.
    """
    tables = []
    for group, values in metrics["groups"].items():
        title = f"{group}: {len(values['tasks'])} task(s), {values['samples']} samples"
        tables.append(_table(title, values["variants"], metrics))
        members = [name for name, task in metrics["tasks"].items() if task["group"] == group] if per_task else []
        for name in members:
            task = metrics["tasks"][name]
            scored = "" if task["scored"] else ", not scored"
            title = f"{name}: {task['metric']}, chance {100 * task['chance']:.0f} %, {task['samples']} samples{scored}"
            tables.append(_table(title, task["variants"], metrics))
    return tables


def task_table(tasks: Iterable[AnyTask]) -> Table:
    """The tasks that there are."""
    table = Table("task", "group", "metric", "chance", "scored", "about")
    for task in tasks:
        scored = "yes" if task.scored else "no"
        about = (task.name, task.group, task.metric, f"{100 * task.chance:.1f} %", scored, task.summary)
        table.add_row(*map(Text, about))
    return table


def _table(title: str, figures: Mapping[str, Figures], metrics: Mapping[str, Any]) -> Table:
    baseline = metrics["baseline"]
    columns = {
        "score (95 %)": lambda one: _interval(one, "score", ""),
        "- full": lambda one: _interval(one, "vs_full", "+"),
        **({f"- {baseline}": lambda one: _interval(one, "vs_baseline", "+")} if baseline else {}),
        "agree": lambda one: f"{100 * one['agreement']:.1f}" if "agreement" in one else "",
        "KL": lambda one: f"{one['kl']:.4f}" if "kl" in one else "",
    }
    filled = {name: read for name, read in columns.items() if any(read(one) for one in figures.values())}
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", min_width=8, overflow="fold")
    for name in ("asked", "KV", *filled):
        table.add_column(name, justify="right", no_wrap=True)
    label = None
    for variant in metrics["variants"]:
        shown = "" if label == variant["label"] else variant["label"]
        label, one = variant["label"], figures[variant["name"]]
        asked = "" if variant["retention"] is None else f"{100 * variant['retention']:g}"
        table.add_row(Text(shown), asked, f"{100 * one['kept']:.1f}", *(read(one) for read in filled.values()))
    return table


def _interval(one: Figures, name: str, sign: str) -> str:
    if name not in one:
        return ""
    mean, low, high = (100 * one[name][key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f} ({low:.1f}, {high:.1f})"
