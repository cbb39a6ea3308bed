# SPDX-License-Identifier: Apache-2.0
"""From settings to tasks: which are evaluated, and how the samples of each are scored."""

from __future__ import annotations

from collections.abc import Sequence

from plphp.errors import ConfigError
from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.built_in import Task, available_tasks, find_tasks
from plphp.evaluation.tasks.datasets import read_data
from plphp.evaluation.tasks.prompt_task import read_prompt_task
from plphp.evaluation.tasks.task import AnyTask, Maker


def resolve_tasks(settings: EvalSettings) -> list[AnyTask]:
    """Make the tasks that the settings name, in order.

    Raises
    ------
    ConfigError
        If a task or group is not known, or two have the same name.
    LoadError
        If data or prompts cannot be read.
    """
    tasks: list[AnyTask] = [*_built_in(settings)]
    for source in settings.data:
        tasks += read_data(source, settings.metric, allow_urls=settings.allow_urls)
    if settings.prompts is not None:
        tasks.append(read_prompt_task(settings.prompts, allow_urls=settings.allow_urls))
    names = [task.name for task in tasks]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"Two tasks have the name {twice[0]!r}: rename one of the files.")
    return tasks


def mode_of(task: AnyTask, mode: str) -> str:
    """Say how the samples of a task are scored: "verify", "decode", "generate" or "label-free".

    Raises
    ------
    ConfigError
        If the task cannot be scored in this mode.
    """
    if mode == "auto":
        return "verify" if task.verifiable else "decode"
    if mode == "verify" and not task.verifiable:
        raise ConfigError(
            f"The task {task.name!r} cannot be verified (metric {task.metric}, or several accepted answers): use "
            "the mode decode or generate for it."
        )
    return mode


def makers_of(task: AnyTask, settings: EvalSettings) -> Sequence[Maker]:
    """Makers of the samples of a task that the settings ask for, in order."""
    return task.sample_makers(settings.split, settings.samples, settings.seed)


def _built_in(settings: EvalSettings) -> list[Task]:
    if not settings.tasks and not settings.data and settings.prompts is None:
        return [task for task in available_tasks().values() if task.scored]
    return find_tasks(settings.tasks)
