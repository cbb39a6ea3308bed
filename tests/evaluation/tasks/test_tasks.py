# SPDX-License-Identifier: Apache-2.0
"""Tasks: seeded, of different splits, and only their own kinds of questions."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from plphp.errors import ConfigError
from plphp.evaluation import Sample, Turn
from plphp.evaluation.tasks.built_in import GROUPS, TASKS, Task, available_tasks, find_tasks
from plphp.evaluation.tasks.synthetic import scenes


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_same_seed_gives_the_same_samples(task: Task) -> None:
    first, second = (list(task.samples("dev", 4, seed=3)) for _ in range(2))
    for sample, again in zip(first, second, strict=True):
        assert (sample.id, sample.turns) == (again.id, again.turns)
        assert all(np.array_equal(a, b) for a, b in zip(sample.images, again.images, strict=True))
    assert list(task.samples("dev", 2, seed=3))[1].turns == first[1].turns
    assert [s.turns for s in task.samples("dev", 4, seed=4)] != [s.turns for s in first]
    assert [s.turns for s in task.samples("test", 4, seed=3)] != [s.turns for s in first]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_sample_has_the_images_and_turns_of_its_task(task: Task) -> None:
    assert task.group in GROUPS
    assert 0 < task.chance < 0.5
    for sample in task.samples("test", 5):
        assert sample.task == task.name
        assert len(sample.images) in task.images
        assert len(sample.turns) == task.turns
        assert [turn.scored for turn in sample.turns] == (
            [True] if task.turns == 1 else [False] + [True] * (task.turns - 1)
        )
        assert len({turn.answer for turn in sample.turns}) == task.turns


@pytest.mark.parametrize("name", ["second_grid", "second_page", "third_in"])
def test_a_later_answer_cannot_be_copied_from_the_dialogue(name: str) -> None:
    for sample in available_tasks()[name].samples("test", 120):
        said: set[str] = set()
        for turn in sample.turns:
            statement = re.search(r"(?:(says|value is) (\w+)|shows an? (\w+) (\w+))\.$", turn.answer)
            assert statement is None or not {*statement.groups()[1:]} - {None} <= said, sample
            said |= set(re.findall(r"\w+", turn.answer))


def test_groups_and_names_find_tasks() -> None:
    assert [task.name for task in find_tasks(["all"])] == list(available_tasks())
    assert {task.group for task in find_tasks(["dialogue"])} == {"dialogue"}
    assert next(task.name for task in find_tasks(["cell", "one_image"])) == "cell"
    assert len(find_tasks(["cell", "cell"])) == 1


def test_an_unknown_task_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"Unknown task or group 'read_pages'.*read_page"):
        find_tasks(["read_pages"])
    with pytest.raises(ConfigError, match="split must be one of dev, test, got 'train'"):
        list(TASKS[0].samples("train", 1))  # type: ignore[arg-type]


def test_only_the_last_question_may_have_several_right_answers() -> None:
    sample = Sample("1", "mine", (), (Turn("A?", "a"), Turn("B?", "b")))
    assert [sample.accepted_answers(turn) for turn in (0, 1)] == [("a",), ("b",)]
    several = dataclasses.replace(sample, accepted=("b", "c"))
    assert [several.accepted_answers(turn) for turn in (0, 1)] == [("a",), ("b", "c")]


def test_no_sample_is_drawn_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the last one is the same without those before it."""
    task = available_tasks()["cell"]
    *_, expected = task.samples("dev", 3)
    drawn = []
    draw = scenes.make_scenes
    monkeypatch.setattr(scenes, "make_scenes", lambda *args, **options: drawn.append(1) or draw(*args, **options))
    makers = task.sample_makers("dev", 3)
    assert (len(makers), drawn) == (3, [])
    assert (makers[2]().id, makers[2]().turns) == (expected.id, expected.turns)
