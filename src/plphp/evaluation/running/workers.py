# SPDX-License-Identifier: Apache-2.0
"""Spread work over processes of one thread each; results come back as they are made, errors as they are."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from plphp.errors import PLPHPError
from plphp.io.quoting import one_line

Work = Callable[..., Iterator[tuple[str, dict[str, Any]]]]
POLL_SECONDS = 1.0


def run_workers(
    work: Work,
    arguments: Sequence[Any],
    shares: Sequence[Any],
    note: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Run ``work(*arguments, share)`` in a process for each share, and hand on what the processes yield.

    Parameters
    ----------
    work : callable
        A function of a module, which yields tasks with records.
    arguments, shares
        What ``work`` is called with; they are pickled.
    note : callable
        Called in this process with each task and record.

    Raises
    ------
    PLPHPError
        What a process raised on purpose.
    RuntimeError
        If a process failed otherwise, or was killed. What came before has been noted.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [context.Process(target=_work, args=(results, work, arguments, share), daemon=True) for share in shares]
    try:
        for process in processes:
            process.start()
        running = len(processes)
        while running:
            kind, *content = _next(results, processes)
            if kind == "record":
                note(*content)
            elif kind == "end":
                running -= 1
            else:
                raise content[0]
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


def _next(results: Any, processes: Sequence[Any]) -> tuple[Any, ...]:
    """Wait for the next message; a process that was killed sends none, which only its exit code shows."""
    while True:
        try:
            message: tuple[Any, ...] = results.get(timeout=POLL_SECONDS)
            return message
        except queue.Empty:
            killed = [process for process in processes if process.exitcode not in (None, 0)]
            if killed:
                raise RuntimeError(
                    f"A worker process ended with code {killed[0].exitcode}: out of memory? Run again to go on."
                ) from None


def _work(results: Any, work: Work, arguments: Sequence[Any], share: Any) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    try:
        for task, record in work(*arguments, share):
            if parent is not None and not parent.is_alive():
                return  # the parent was killed: nobody takes the results
            results.put(("record", task, record))
        results.put(("end",))
    except KeyboardInterrupt:
        pass
    except PLPHPError as error:
        results.put(("error", error))
    except Exception as error:
        results.put(("error", RuntimeError(f"A worker process failed: {type(error).__name__}: {one_line(error)}")))
