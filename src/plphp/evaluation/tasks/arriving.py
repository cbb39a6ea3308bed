# SPDX-License-Identifier: Apache-2.0
"""Conversations whose images arrive over the turns, and questions about the newest image, an old one, or two."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from .choices import Split
from .drawn import SCALE, DrawnTask
from .synthetic.questions import ask_colours
from .synthetic.scenes import Item, Scene, make_grid
from .synthetic.sprites import SHAPES
from .synthetic.truths import shown_once
from .task import Sample, Turn

ARRIVING = "arriving_images"
"""Name of the group."""
LARGEST = 3
"""Rows and columns of a grid at most: the more images there are, the less each of them may hold to be found again."""
About = Literal["newest", "old", "two"]


@dataclass(frozen=True)
class ArrivingTask(DrawnTask):
    """Questions that a conversation ends with, by the age of the images that they are about.

    One or two images come with each turn, and each of these turns asks about its last image. The last turn brings no
    image; its question alone is scored. It is for the colours of shapes that only the image in question shows, and
    names no image: the bundled model knows numbers of images up to four, as far as training had them.

    Parameters
    ----------
    name, group, summary, chance, metric, scored
        See `plphp.evaluation.tasks.task.AnyTask`.
    about : {"newest", "old", "two"}
        What the scored question asks for: a shape of the newest image, of an older one, or one of each.
    images : tuple of int
        How many images a conversation may have.
    """

    name: str
    summary: str
    chance: float
    about: About
    images: tuple[int, ...]
    group: str = ARRIVING
    metric: str = "exact_match"
    scored: bool = True

    def _sample(self, split: Split, number: int, seed: int) -> Sample:
        rng = self.chance_of(split, number, seed)
        arrivals = _arrivals(rng, rng.choice(self.images))
        scenes, asked = self._draw(rng, split, arrivals)
        history = [
            # An answer of as many sentences as the last: the model goes on in the form of the answers that it finds.
            ask_colours(
                rng, rng.sample(_open_things(scenes[shown - 1], asked), len(asked)), shown if shown > 1 else None
            )
            for shown in accumulate(arrivals)
        ]
        last = ask_colours(rng, [item for _, item in asked])
        return Sample(
            id=f"{split}-{seed}-{number}",
            task=self.name,
            images=tuple(scene.draw(SCALE) for scene in scenes),
            turns=(*(Turn(turn.text, turn.answer, scored=False) for turn in history), Turn(last.text, last.answer)),
            arrivals=(*arrivals, 0),
            ages=tuple(len(scenes) - 1 - image for image, _ in asked),
        )

    def _draw(
        self, rng: random.Random, split: Split, arrivals: Sequence[int]
    ) -> tuple[list[Scene], list[tuple[int, Item]]]:
        """Draw grids, and the shapes that are asked for with the numbers, from 0, of the images that show them.

        Again until there are such shapes, and enough else in the last image of each turn for its own question.
        """
        count = sum(arrivals)
        while True:
            scenes = [make_grid(rng, split, LARGEST) for _ in range(count)]
            newest, old = count - 1, rng.randrange(count - 1)
            images = {"newest": [newest], "old": [old], "two": rng.sample([newest, old], 2)}[self.about]
            asked = [(image, item) for image in images for item in _shapes(rng, scenes[image])]
            if len({item.value for _, item in asked}) < len(images):
                continue
            scenes = _in_one_image(scenes, asked)
            if all(len(_open_things(scenes[shown - 1], asked)) >= len(asked) for shown in accumulate(arrivals)):
                return scenes, asked


def _arrivals(rng: random.Random, count: int) -> list[int]:
    """Deal images out to turns, one or two to each."""
    arrivals: list[int] = []
    while sum(arrivals) < count:
        arrivals.append(min(rng.randint(1, 2), count - sum(arrivals)))
    return arrivals


def _in_one_image(scenes: Sequence[Scene], asked: Sequence[tuple[int, Item]]) -> list[Scene]:
    """The scenes without what would be taken for a thing that is asked for: their cells stay empty."""
    home = {item.value: image for image, item in asked}
    return [
        dataclasses.replace(scene, items=tuple(item for item in scene.items if home.get(item.value, image) == image))
        for image, scene in enumerate(scenes)
    ]


def _shapes(rng: random.Random, scene: Scene) -> list[Item]:
    """A shape that a scene shows once, or nothing."""
    shapes = [item for item in shown_once(scene) if item.value in SHAPES]
    return [rng.choice(shapes)] if shapes else []


def _open_things(scene: Scene, asked: Sequence[tuple[int, Item]]) -> list[Item]:
    """What a scene shows once and the scored question does not ask for."""
    kept_back = {item.value for _, item in asked}
    return [item for item in shown_once(scene) if item.value not in kept_back]


ARRIVING_TASKS = (
    ArrivingTask("newest_image", "the colour of a shape of the newest image", 1 / 8, "newest", (2, 3, 4, 6, 8, 12)),
    ArrivingTask("old_image", "the colour of a shape of an image before the newest", 1 / 8, "old", (2, 3, 4, 6, 8)),
    ArrivingTask(
        "two_images", "the colours of shapes of the newest image and of an older one", 1 / 64, "two", (2, 3, 4, 6)
    ),
)
"""Asked for by name: no other run has them."""
