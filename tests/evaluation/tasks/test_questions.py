# SPDX-License-Identifier: Apache-2.0
"""Questions: every answer follows from the scenes it is about."""

from __future__ import annotations

import random
import re

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from plphp.evaluation.tasks.synthetic import questions, scenes, truths
from plphp.evaluation.tasks.synthetic.scenes import Scene


def _rows(text: str) -> list[list[str]]:
    lines = [line for line in text.split("\n") if line.startswith("Row ")]
    return [line.rstrip(".").partition(": ")[2].split(", ") for line in lines]


def _check_one(kind: str, question: questions.Question, scene: Scene) -> None:
    text, answer = question.text, question.answer
    things = {f"{item.colour} {item.value}": item for item in scene.items}
    if kind == "cell":
        row, col = map(int, re.findall(r"\d", answer)[:2])
        content = scene.cell(row, col)
        assert f"row {row}, column {col}" in text
        assert answer.endswith("shows nothing." if content == "nothing" else f" {content}.")
    elif kind == "digit_of_colour":
        colour, digit = answer.split()[1], answer[-2]
        assert [i.value for i in scene.items if i.builder == "digit" and i.colour == colour] == [digit]
    elif kind in ("colour_of", "colours_of"):
        said = re.findall(r"The (?:digit )?(\w+) is (\w+)\.", answer)
        assert len(said) == 1 if kind == "colour_of" else 2 <= len(said) <= 4
        for value, colour in said:
            assert [i.colour for i in scene.items if i.value == value] == [colour]
            assert value in text
    elif kind in ("relation", "neighbours"):
        sides = {"right of": (0, 1), "left of": (0, -1), "above": (-1, 0), "below": (1, 0)}
        thing, row, col = re.match(r"The (\w+ \w+) is in row (\d), column (\d)\. ", answer).groups()  # type: ignore[union-attr]
        item = things[thing]
        assert (item.row, item.col) == (int(row), int(col))
        assert thing in text
        said = re.findall(r"Row (\d), column (\d) shows (?:an? )?([\w ]+)\.", answer)
        assert all(scene.cell(int(r), int(c)) == content for r, c, content in said)
        near = {side: (item.row + down, item.col + right) for side, (down, right) in sides.items()}
        inside = {side: (r, c) for side, (r, c) in near.items() if 1 <= r <= scene.rows and 1 <= c <= scene.cols}
        asked = (
            inside
            if kind == "neighbours"
            else {side: at for side, at in inside.items() if re.search(f"{side} (the|it)", text)}
        )
        assert [(int(r), int(c)) for r, c, _ in said] == list(asked.values())
    elif kind in ("lookup", "lookups"):
        said = re.findall(r"(\w) is (\w+), on line (\w+)\. The value is (\w+)\.", answer)
        assert len(said) == 1 if kind == "lookup" else len({key for key, *_ in said}) >= 2
        for key, colour, row, value in said:
            assert scene.line(truths.NUMBERS.index(row)) == key + value
            assert scene.at[truths.NUMBERS.index(row), 1].colour == colour
            assert f" {key}" in text
    elif kind == "read_table":
        said = re.findall(r"The value of (\w) is (\w+)\.", answer)
        assert ["".join(pair) for pair in said] == [scene.line(r) for r in range(1, scene.rows + 1)]
    elif kind == "read_line":
        row, code = re.fullmatch(r"Line (\d) says (\w+)\.", answer).groups()  # type: ignore[union-attr]
        assert scene.line(int(row)) == code
        assert f"line {row}" in text
    elif kind == "read_colour":
        colour, code = re.fullmatch(r"The (\w+) text says (\w+)\.", answer).groups()  # type: ignore[union-attr]
        assert {scene.line(i.row) for i in scene.items if i.colour == colour} == {code}
        assert colour in text
    elif kind == "list_row":
        row = int(answer.split()[1])
        assert _rows(answer.replace(" shows:", ":"))[0] == [scene.cell(row, c) for c in range(1, scene.cols + 1)]
    elif kind == "list_grid":
        assert _rows(answer) == [[scene.cell(r, c) for c in range(1, scene.cols + 1)] for r in range(1, scene.rows + 1)]
    elif kind == "read_page":
        assert answer == "\n".join(f"Line {r}: {scene.line(r)}" for r in range(1, scene.rows + 1))
    elif kind == "count":
        colour = next(name for name in scenes.COLOURS if name in text)
        rows = [[i.value for i in scene.items if i.row == r and i.colour == colour] for r in range(1, scene.rows + 1)]
        assert _rows(answer) == [row or ["nothing"] for row in rows]
        assert answer.endswith(f"\n{sum(map(len, rows))} in all.")
    else:
        raise AssertionError(f"no check for {kind}")


@pytest.mark.parametrize("kind", truths.ABOUT_ONE)
def test_answers_about_one_image_follow_from_it(kind: str) -> None:
    rng = random.Random(11)
    asked = 0
    for _ in range(90):
        scene = scenes.make_scenes(rng, "test", 1)[0]
        question = questions.ask(rng, [scene], kind)
        if question is not None:
            asked += 1
            _check_one(kind, question, scene)
    assert asked >= 8


@pytest.mark.parametrize("kind", truths.ABOUT_SEVERAL)
def test_answers_about_several_images_follow_from_them(kind: str) -> None:
    rng = random.Random(12)
    asked = 0
    for _ in range(60):
        drawn = scenes.make_scenes(rng, "test", 3, kinds=("grid", "grid", "text"))
        question = questions.ask(rng, drawn, kind)
        if question is None:
            continue
        asked += 1
        if kind == "compare":
            r, c = re.search(r"row (\d), column (\d)", question.text).groups()  # type: ignore[union-attr]
            said = re.findall(rf"Image (\d): row {r}, column {c} shows (?:an? )?([\w ]+)\.", question.answer)
            assert len(said) == 2
            assert all(shown == drawn[int(k) - 1].cell(int(r), int(c)) for k, shown in said)
            continue
        said = re.findall(r"The (?:digit )?(\w+) is (\w+), in image (\w+)\.", question.answer)
        assert len(said) == 1 if kind == "which_image" else len(said) >= 2
        names, numbers = [name for name, *_ in said], [truths.NUMBERS.index(word) for *_, word in said]
        for name, colour, word in said:
            holders = [
                (k, i.colour) for k, s in enumerate(drawn) for i in s.items if s.kind == "grid" and i.value == name
            ]
            assert holders == [(truths.NUMBERS.index(word) - 1, colour)]
        if kind == "order":
            first = names[0] if numbers[0] < numbers[1] else names[1]
            assert question.answer.endswith(f"{first} comes first.")
    assert asked >= 8


def test_with_several_images_the_question_names_the_image() -> None:
    rng = random.Random(13)
    for _ in range(50):
        question = questions.ask_any(rng, scenes.make_scenes(rng, "test", 2))
        assert question is None or "image" in question.text or question.kind in truths.ABOUT_SEVERAL


def test_an_unknown_kind_is_refused() -> None:
    scene = scenes.make_grid(random.Random(1), "test")
    with pytest.raises(ValueError, match="unknown kind of question 'colours'"):
        questions.ask(random.Random(1), [scene], "colours")
