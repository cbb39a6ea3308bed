# SPDX-License-Identifier: Apache-2.0
"""Prompts without answers as a task, for the label-free measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from plphp.errors import UnsupportedFeatureError
from plphp.inputs.prompts_file import Prompt, read_prompts

from .choices import Split
from .task import Maker, Sample, Turn


@dataclass(frozen=True)
class PromptTask:
    """Prompts of a file, with the attributes of a built-in task.

    Parameters
    ----------
    name, group, summary, metric, chance, scored, verifiable
        See `plphp.evaluation.tasks.task.AnyTask`.
    makers : tuple of callable
        Make one sample each, in order: images are read when they are needed.
    """

    name: str
    summary: str
    makers: tuple[Maker, ...] = field(repr=False)
    group: str = "prompts"
    metric: str = "none"
    chance: float = 0.0
    scored: bool = False
    verifiable: bool = False

    def sample_makers(self, split: Split, count: int, seed: int = 0) -> Sequence[Maker]:
        """Makers of the first ``count`` prompts; a file has one split, and an order of its own."""
        return self.makers[:count]


def read_prompt_task(path: str | Path, *, allow_urls: bool = False) -> PromptTask:
    """Read a file of prompts, see `plphp.inputs.prompts_file.read_prompts`.

    Raises
    ------
    LoadError
        If it cannot be read or one of its lines is not a prompt.
    UnsupportedFeatureError
        If a prompt is a chat: give its question and images.
    """
    prompts = read_prompts(path, allow_urls=allow_urls)
    for prompt in prompts:
        if prompt.question is None:
            raise UnsupportedFeatureError(f'{prompt.origin}: the label-free measures take a "question", not "turns".')
    makers = tuple(partial(_sample, prompt) for prompt in prompts)
    return PromptTask(Path(path).stem, f"{len(prompts)} prompts of {path}", makers)


def _sample(prompt: Prompt) -> Sample:
    turn = Turn(prompt.question or "", "", scored=True)
    return Sample(prompt.origin, "prompts", tuple(prompt.read_images()), (turn,))
