# SPDX-License-Identifier: Apache-2.0
"""Conversations whose images arrive over the turns, as they are drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from plphp.evaluation import EvalSettings, Sample
from plphp.evaluation.running.task_choice import resolve_tasks
from plphp.evaluation.tasks.arriving import ARRIVING, ARRIVING_TASKS, ArrivingTask
from plphp.evaluation.tasks.built_in import GROUPS, all_tasks, available_tasks, find_tasks
from plphp.evaluation.tasks.synthetic.scenes import Scene

SHAPE = re.compile(r"The ([a-z]+) is ([a-z]+)\.")


@pytest.fixture(params=ARRIVING_TASKS, ids=lambda task: task.name)
def task(request: pytest.FixtureRequest) -> ArrivingTask:
    return request.param


def test_they_are_asked_for_by_name() -> None:
    assert ARRIVING not in GROUPS
    assert {task.name for task in find_tasks([ARRIVING])} == set(all_tasks()) - set(available_tasks())
    assert [task.group for task in find_tasks(["two_images", "cell"])] == [ARRIVING, "one_image"]
    for tasks in (find_tasks(["all"]), resolve_tasks(EvalSettings())):
        assert {task.group for task in tasks} == set(GROUPS)


def test_the_same_seed_gives_the_same_samples(task: ArrivingTask) -> None:
    first, second = (list(task.samples("dev", 3, seed=3)) for _ in range(2))
    for sample, again in zip(first, second, strict=True):
        assert (sample.id, sample.turns, sample.ages) == (again.id, again.turns, again.ages)
        assert all(np.array_equal(a, b) for a, b in zip(sample.images, again.images, strict=True))
    assert [s.turns for s in task.samples("test", 3, seed=3)] != [s.turns for s in first]


def test_images_arrive_by_ones_and_twos_and_the_last_turn_brings_none(task: ArrivingTask) -> None:
    counts = set()
    for sample in task.samples("dev", 12):
        *with_images, last = sample.arrivals
        assert {*with_images} <= {1, 2}
        assert (last, sum(with_images)) == (0, len(sample.images))
        assert [turn.scored for turn in sample.turns] == [False] * len(with_images) + [True]
        shown = [sample.images_with(turn) for turn in range(len(sample.turns))]
        assert [image for images in shown for image in images] == list(sample.images)
        counts.add(len(sample.images))
    assert counts <= set(task.images)
    assert len(counts) > 2


def test_ages_say_how_many_images_came_later(task: ArrivingTask) -> None:
    for sample in task.samples("dev", 12):
        ages = sorted(sample.ages)
        assert ages[-1] < len(sample.images)
        assert {"newest": ages == [0], "old": ages[0] > 0, "two": ages[0] == 0 and ages[-1] > 0}[task.about]
        assert len(ages) == (2 if task.about == "two" else 1)


def test_what_is_asked_for_stands_once_in_the_conversation(task: ArrivingTask, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Scene] = []
    draw = Scene.draw
    monkeypatch.setattr(Scene, "draw", lambda scene, scale=1: drawn.append(scene) or draw(scene, 1))
    for make in task.sample_makers("dev", 12):
        drawn.clear()
        sample = make()
        answers = SHAPE.findall(sample.turns[-1].answer)
        assert len(answers) == len(sample.ages)
        for (shape, colour), age in zip(answers, sample.ages, strict=True):
            showing = [(k, item) for k, scene in enumerate(drawn) for item in scene.items if item.value == shape]
            assert [(k, item.colour) for k, item in showing] == [(len(drawn) - 1 - age, colour)]
            assert not any(shape in turn.answer for turn in sample.turns[:-1])


def test_a_question_of_the_history_is_about_the_image_that_came_with_it(
    task: ArrivingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Scene] = []
    draw = Scene.draw
    monkeypatch.setattr(Scene, "draw", lambda scene, scale=1: drawn.append(scene) or draw(scene, 1))
    sample: Sample = next(task.samples("test", 1))
    shown = 0
    for turn, count in zip(sample.turns, sample.arrivals[:-1], strict=False):
        shown += count
        said = re.findall(r"The (?:digit )?(\w+) is (\w+)\.", turn.answer)
        assert len(said) == len(sample.ages)
        assert set(said) <= {(item.value, item.colour) for item in drawn[shown - 1].items}
        assert shown == 1 or f"image {shown}" in turn.question
