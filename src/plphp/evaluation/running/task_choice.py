# SPDX-License-Identifier: Apache-2.0
"""From settings to tasks: which are evaluated, and how the samples of each are scored."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from plphp.errors import ConfigError
from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.arriving import ARRIVING, ArrivingTask
from plphp.evaluation.tasks.built_in import available_tasks, find_tasks
from plphp.evaluation.tasks.datasets import read_data
from plphp.evaluation.tasks.drawn import DrawnTask
from plphp.evaluation.tasks.prompt_task import read_prompt_task
from plphp.evaluation.tasks.task import AnyTask, Maker

from .variants import Variant

TURNS = "turns"
"""How conversations are scored whose images arrive over the turns."""


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
    """Say how the samples of a task are scored: "verify", "decode", "generate", "label-free", or "turns" where images
    arrive over the turns of a conversation.

    Raises
    ------
    ConfigError
        If the task cannot be scored in this mode.
    """
    if isinstance(task, ArrivingTask):
        if mode not in ("auto", "verify"):
            raise ConfigError(
                f"The images of the task {task.name!r} arrive over the turns: it is scored in the modes auto and "
                f"verify alone, got {mode!r}."
            )
        return TURNS
    if mode == "auto":
        return "verify" if task.verifiable else "decode"
    if mode == "verify" and not task.verifiable:
        raise ConfigError(
            f"The task {task.name!r} cannot be verified (metric {task.metric}, or several accepted answers): use "
            "the mode decode or generate for it."
        )
    return mode


def refuse_turns(variant: Variant, modes: Collection[str]) -> None:
    """Refuse a variant for conversations whose images arrive over the turns, or for anything else.

    Raises
    ------
    ConfigError
        If it makes images smaller before they are read, and the tasks have such a conversation; or if its budget is a
        share of a conversation, and they have a task without.
    """
    if TURNS in modes and variant.images == "smaller":
        raise ConfigError("Images that arrive over the turns are not made smaller: ask for other tasks with it.")
    if variant.budget_share is not None and set(modes) != {TURNS}:
        raise ConfigError(
            f"A vision_budget of a share is one of a conversation: ask for tasks of the group {ARRIVING} alone, or "
            "give the budget in bytes."
        )


def makers_of(task: AnyTask, settings: EvalSettings) -> Sequence[Maker]:
    """Makers of the samples of a task that the settings ask for, in order."""
    return task.sample_makers(settings.split, settings.samples, settings.seed)


def _built_in(settings: EvalSettings) -> Sequence[DrawnTask]:
    if not settings.tasks and not settings.data and settings.prompts is None:
        return [task for task in available_tasks().values() if task.scored]
    return find_tasks(settings.tasks)
