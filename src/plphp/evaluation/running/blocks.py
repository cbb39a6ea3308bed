# SPDX-License-Identifier: Apache-2.0
"""What is left to do of a run: samples in blocks that are scored together, dealt out to processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plphp.evaluation.results.store import Store
from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.task import AnyTask

from .task_choice import makers_of

Blocks = dict[str, list[range]]
"""By the name of the task, the numbers of the samples that are scored together."""


@dataclass(frozen=True)
class Remainder:
    """What is left of a run.

    Parameters
    ----------
    blocks : dict
        Blocks with a sample that is not done.
    done, total : int
        How many samples need not be scored any more, and how many there are.
    """

    blocks: Blocks
    done: int
    total: int


def remainder(store: Store, tasks: Sequence[AnyTask], settings: EvalSettings, modes: Mapping[str, str]) -> Remainder:
    """Work out what is left of a run.

    Blocks do not depend on what is done, so that a batch is padded alike whenever it is run; a block that was cut off
    is done again.
    """
    blocks: Blocks = {}
    left = total = 0
    for task in tasks:
        size, step = len(makers_of(task, settings)), settings.batch if modes[task.name] == "generate" else 1
        finished = store.finished(task.name)
        unfinished = [block for block in _cut(size, step) if not finished.issuperset(block)]
        if unfinished:
            blocks[task.name] = unfinished
        left += sum(map(len, unfinished))
        total += size
    return Remainder(blocks, total - left, total)


def shares(blocks: Blocks, workers: int) -> list[Blocks]:
    """Deal blocks out to processes, task by task; a process that would get none is left out."""
    dealt = [{task: numbers[worker::workers] for task, numbers in blocks.items()} for worker in range(workers)]
    return [share for share in dealt if any(share.values())]


def _cut(size: int, step: int) -> list[range]:
    return [range(start, min(start + step, size)) for start in range(0, size, step)]
