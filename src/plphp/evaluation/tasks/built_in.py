# SPDX-License-Identifier: Apache-2.0
"""The built-in tasks: what is asked about which synthetic images, in four groups."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from plphp.errors import ConfigError, did_you_mean
from plphp.evaluation.tasks.synthetic.questions import Question
from plphp.evaluation.tasks.synthetic.scenes import Kind, Scene

from .arriving import ARRIVING, ARRIVING_TASKS
from .choices import Split
from .drawn import SCALE, DrawnTask
from .synthetic import questions, scenes
from .task import Sample, Turn

GROUPS = ("one_image", "several_images", "several_regions", "dialogue")
"""Groups of the built-in tasks, by what a question asks for."""


@dataclass(frozen=True)
class Task(DrawnTask):
    """A kind of question, with everything that a table has to say about it.

    Parameters
    ----------
    name : str
        Unique name.
    group : str
        One of ``GROUPS``.
    summary : str
        One line.
    chance : float
        Share of right answers of a guesser who knows the form of the answer, but sees nothing (a fraction).
    kinds : tuple of str
        Kinds of questions, see `plphp.evaluation.tasks.synthetic.questions.PHRASINGS`; one is drawn for each turn.
    scenes : tuple of str
        Kinds of scenes that an image may show.
    images : tuple of int
        How many images a prompt may have.
    turns : int
        Questions of a conversation; all but the first are scored, if there is more than one.
    metric : str
        "exact_match" of the whole answer.
    scored : bool
        Whether it counts in the mean of its group.
    """

    name: str
    group: str
    summary: str
    chance: float
    kinds: tuple[str, ...]
    scenes: tuple[Kind, ...] = ("grid",)
    images: tuple[int, ...] = (1,)
    turns: int = 1
    metric: str = "exact_match"
    scored: bool = True

    def _sample(self, split: Split, number: int, seed: int) -> Sample:
        drawn, asked = self._draw(self.chance_of(split, number, seed), split)
        return Sample(
            id=f"{split}-{seed}-{number}",
            task=self.name,
            images=tuple(scene.draw(SCALE) for scene in drawn),
            turns=tuple(
                Turn(question.text, question.answer, scored=self.turns == 1 or turn > 0)
                for turn, question in enumerate(asked)
            ),
        )

    def _draw(self, rng: random.Random, split: Split) -> tuple[list[Scene], list[Question]]:
        """Draw scenes and questions until every question can be asked and is worth asking."""
        while True:
            drawn = scenes.make_scenes(rng, split, rng.choice(self.images), kinds=self.scenes)
            asked = [questions.ask(rng, drawn, rng.choice(self.kinds)) for _ in range(self.turns)]
            usable = [question for question in asked if question is not None and _has_content(question)]
            if len(usable) == self.turns and all(_is_new(usable[turn], usable[:turn]) for turn in range(1, self.turns)):
                return drawn, usable


def _has_content(question: Question) -> bool:
    """Whether the answer is more than that there is nothing, that nothing differs, or a page of one line."""
    if question.kind == "compare":
        first, second = (part.split(" shows ")[1] for part in question.answer.rstrip(".").split(". "))
        return first != second
    if question.kind in ("cell", "relation"):
        return "nothing" not in question.answer
    if question.kind == "read_page":
        return "\n" in question.answer
    return True


def _is_new(question: Question, before: Sequence[Question]) -> bool:
    """Whether the answer says something that no earlier answer of the dialogue said.

    Else it could be copied from the conversation, without a look at the images.
    """

    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text)) - FORM

    new = words(question.answer) - words(question.text)
    said = {word for earlier in before for word in words(earlier.answer)}
    return not new <= said if new else question.answer not in [earlier.answer for earlier in before]


FORM = frozenset(
    ["a", "an", "The", "Row", "Line", "digit", "is", "line", "on", "row", "column", "says", "shows", "text", "value"]
)
"""Words of answers that say nothing about an image."""
SEVERAL = 2, 3, 4
THING, PLACED_THING, CODE, DIGIT, COLOUR = 1 / 80, 0.001, 0.001, 0.1, 1 / 8
TASKS = (
    Task("cell", "one_image", "what a cell of a grid shows", THING, ("cell",)),
    Task("digit_of_colour", "one_image", "the handwritten digit of a colour", DIGIT, ("digit_of_colour",),
         scored=False),
    Task("colour_of", "one_image", "the colour of a thing", COLOUR, ("colour_of",)),
    Task("relation", "one_image", "where a thing is, and what is beside, above or below it", PLACED_THING,
         ("relation",)),
    Task("lookup", "one_image", "the value of a key in a table", CODE, ("lookup",), ("table",)),
    Task("read_line", "one_image", "the code on a line of a page", CODE, ("read_line",), ("text",)),
    Task("read_colour", "one_image", "the code printed in a colour", CODE, ("read_colour",), ("text",)),
    Task("which_image", "several_images", "which image shows a thing", 0.04, ("which_image",), ("grid",), SEVERAL),
    Task("cell_in", "several_images", "what a cell of one image shows", THING, ("cell",), ("grid", "text"), SEVERAL),
    Task("find_in", "several_images", "a thing of one image by its colour, or its colour", 0.11,
         ("digit_of_colour", "colour_of"), ("grid", "table"), SEVERAL, scored=False),
    Task("read_in", "several_images", "a code of one image", CODE,
         ("read_line", "read_colour", "lookup"), ("grid", "text", "table"), SEVERAL),
    Task("compare", "several_images", "what a cell shows in two images", 0.001, ("compare",), ("grid",), SEVERAL),
    Task("order", "several_images", "which of two things comes first", 0.004, ("order",), ("grid",), SEVERAL),
    Task("list_row", "several_regions", "everything in a row of a grid", 0.001, ("list_row",)),
    Task("list_grid", "several_regions", "everything in a grid, row by row", 0.001, ("list_grid",)),
    Task("read_page", "several_regions", "every line of a page", CODE, ("read_page",), ("text",)),
    Task("count", "several_regions", "the things of a colour in every row, and their number", 0.01, ("count",)),
    Task("second_grid", "dialogue", "a second question about another part of a grid", 0.06,
         ("cell", "digit_of_colour", "colour_of", "list_row"), turns=2),
    Task("second_page", "dialogue", "a second question about another line of a page or a table", CODE,
         ("read_line", "read_colour", "lookup"), ("text", "table"), turns=2),
    Task("third_in", "dialogue", "a second and a third question about several images", 0.003,
         ("cell", "digit_of_colour", "colour_of", "read_line", "lookup"), ("grid", "text", "table"), (2, 3), turns=3),
)  # fmt: skip
"""The built-in tasks of these groups.

The chance levels are rounded; the table of results has the measured score with blank images.
"""


def available_tasks() -> dict[str, Task]:
    """The built-in tasks of `GROUPS` by name, in the order of their groups."""
    return {task.name: task for task in TASKS}


def all_tasks() -> dict[str, DrawnTask]:
    """The built-in tasks by name, with those of arriving images, which are evaluated only where they are asked for."""
    return {**available_tasks(), **{task.name: task for task in ARRIVING_TASKS}}


def find_tasks(names: Sequence[str]) -> list[DrawnTask]:
    """Look tasks up by name, where the name of a group stands for all its tasks and "all" for those of `GROUPS`.

    Raises
    ------
    ConfigError
        If a name is unknown.
    """
    tasks: dict[str, DrawnTask] = {}
    for name in names:
        named = [task for task in all_tasks().values() if name in (task.name, task.group)]
        if name == "all":
            named = [*TASKS]
        if not named:
            known = [*GROUPS, ARRIVING, *all_tasks()]
            raise ConfigError(f"Unknown task or group {name!r}.{did_you_mean(name, known)}")
        tasks.update((task.name, task) for task in named)
    return list(tasks.values())
