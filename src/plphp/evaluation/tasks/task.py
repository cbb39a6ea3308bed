# SPDX-License-Identifier: Apache-2.0
"""What every task is made of: samples with images and turns, and the attributes that a table shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from .choices import Split


@dataclass(frozen=True)
class Turn:
    """One question of a conversation.

    Parameters
    ----------
    question : str
        What the user says.
    answer : str
        The reference answer.
    scored : bool
        Whether the answer counts; earlier turns of a dialogue do not.
    """

    question: str
    answer: str
    scored: bool = True


@dataclass(frozen=True)
class Sample:
    """Images and a conversation about them.

    Parameters
    ----------
    id : str
        Unique within its task.
    task : str
        Name of the task.
    images : tuple of PIL.Image.Image
        In the order in which they come.
    turns : tuple of Turn
        In order.
    system : str, optional
        System text; None for the chat template's own.
    accepted : tuple of str
        Answers to the last question that are all right, where there are several; the turn's own is the first.
    arrivals : tuple of int
        For each turn, how many of the images come with its question; empty where all stand before the first one.
    ages : tuple of int
        For each image that the scored question is about, how many images came after it; empty where nothing arrives
        later.
    """

    id: str
    task: str
    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]
    system: str | None = None
    accepted: tuple[str, ...] = ()
    arrivals: tuple[int, ...] = ()
    ages: tuple[int, ...] = ()

    def images_with(self, turn: int) -> tuple[Image.Image, ...]:
        """Images that come with the question of a turn; turns are numbered from 0."""
        arrivals = self.arrivals or (len(self.images), *[0] * (len(self.turns) - 1))
        first = sum(arrivals[:turn])
        return self.images[first : first + arrivals[turn]]

    def accepted_answers(self, turn: int) -> tuple[str, ...]:
        """Answers to the question of a turn that count as right; turns are numbered from 0."""
        is_last = turn == len(self.turns) - 1
        return self.accepted if self.accepted and is_last else (self.turns[turn].answer,)


Maker = Callable[[], Sample]
"""Makes a sample; images are drawn or read only then."""


class AnyTask(Protocol):
    """What an evaluation asks of a task, whether it is built in or reads the user's own data.

    Attributes
    ----------
    name : str
        Unique in an evaluation; also the name of the file of its predictions.
    group : str
        The figures of a group are means over its tasks.
    summary : str
        A line about it.
    metric : str
        Name of the metric, see `plphp.evaluation.tasks.metrics`; "none" where there are no answers.
    chance : float
        Score that is reached without the images, in [0, 1].
    scored : bool
        Whether it counts in the mean of its group.
    verifiable : bool
        Whether one pass over a reference answer can say if greedy decoding would give it.
    """

    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def chance(self) -> float: ...
    @property
    def scored(self) -> bool: ...
    @property
    def verifiable(self) -> bool: ...

    def sample_makers(self, split: Split, count: int, seed: int) -> Sequence[Maker]:
        """Makers of the first ``count`` samples, in order; fewer where the task has fewer."""
        ...
