# SPDX-License-Identifier: Apache-2.0
"""Questions: every answer follows from the scene it is about."""

from __future__ import annotations

import random
import re

import pytest

from training import questions, scenes


@pytest.mark.parametrize("task", [*questions.GRID_TASKS, *questions.TEXT_TASKS])
def test_single_image_answers_follow_from_the_scene(task: str) -> None:
    rng = random.Random(11)
    asked = 0
    for _ in range(60):
        scene = scenes.make_scenes(rng, "test", 1)[0]
        question = questions.ask(rng, [scene], task)
        if question is None:
            continue
        asked += 1
        text, answer = question.text, question.answer
        if task == "cell":
            row, col = map(int, re.findall(r"\d", answer)[:2])
            content = scene.cell(row, col)
            assert answer.endswith("nothing." if content == "nothing" else f" {content}.")
            assert f"row {row}, column {col}" in text
        elif task == "digit_of_colour":
            colour, digit = answer.split()[1], answer[-2]
            assert [i.value for i in scene.items if i.builder == "digit" and i.colour == colour] == [digit]
        elif task == "colour_of":
            *_, value, _, colour = answer.rstrip(".").split()
            assert [i.colour for i in scene.items if i.value == value] == [colour]
        elif task in {"list_row", "list_grid"}:
            for line in answer.split("\n"):
                head, _, rest = line.rstrip(".").partition(": ")
                row = int(head.split()[1])
                assert rest.split(", ") == [scene.cell(row, col) for col in range(1, scene.cols + 1)]
        elif task == "read_page":
            assert answer == "\n".join(f"Line {r}: {scene.line(r)}" for r in range(1, scene.rows + 1))
        else:
            assert answer.rstrip(".").split()[-1] in {scene.line(r) for r in range(1, scene.rows + 1)}
    assert asked > 10


def test_which_image_names_the_only_one() -> None:
    rng = random.Random(12)
    asked = 0
    for _ in range(60):
        drawn = scenes.make_scenes(rng, "test", 3)
        question = questions.ask(rng, drawn, "which_image")
        if question is None:
            continue
        asked += 1
        match = re.fullmatch(r"The (?:digit )?(\w+) is in image (\d)\.", question.answer)
        assert match is not None
        holders = [k for k, s in enumerate(drawn, 1) for i in s.items if s.kind == "grid" and i.value == match[1]]
        assert set(holders) == {int(match[2])}
    assert asked > 10


def test_with_several_images_the_question_names_the_image() -> None:
    rng = random.Random(13)
    for _ in range(50):
        drawn = scenes.make_scenes(rng, "test", 2)
        question = questions.ask(rng, drawn)
        assert question is None or "image" in question.text


def test_an_unknown_task_is_refused() -> None:
    scene = scenes.make_grid(random.Random(1), "test")
    with pytest.raises(ValueError, match="unknown task 'count'"):
        questions.ask_one(random.Random(1), scene, "count")
