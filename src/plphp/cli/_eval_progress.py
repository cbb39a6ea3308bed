# SPDX-License-Identifier: Apache-2.0
"""How far an evaluation is, on standard error: a bar in a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ._app import quiet_libraries

if TYPE_CHECKING:
    from plphp.evaluation.running.runner import Progress as ReportProgress

SECONDS = 20.0
"""Between two lines of a log."""


@contextmanager
def shown_progress(quiet: bool) -> Iterator[ReportProgress]:
    """Show the progress over all samples; yields the function that `evaluate` calls."""
    quiet_libraries()
    if quiet:
        yield lambda task, done, total: None
    elif not sys.stderr.isatty():
        yield _Lines()
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            line = bar.add_task("loading the model", total=None)
            yield lambda task, done, total: bar.update(line, description=task, completed=done, total=total)


class _Lines:
    """A line for the first finished sample of each task, for the last of all, and every `SECONDS` between them."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._tasks: set[str] = set()

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if task not in self._tasks or done == total or now - self._last >= SECONDS:
            self._tasks.add(task)
            self._last = now
            print(f"{done} of {total} samples, {task}, {now - self._started:.0f} s", file=sys.stderr, flush=True)
