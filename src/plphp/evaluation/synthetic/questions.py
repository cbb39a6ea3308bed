# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes with their true answers: several phrasings, one form of answer per kind of question.

Answers are sentences in which what was asked comes late: the first token of an answer is predicted from the
unpruned prompt, so a one-word answer would not show what pruning lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import sprites
from .scenes import Item, Scene

DEFAULT_SYSTEM = (
    "You are a careful assistant. You see one or several images, and each of them has a number. Answer the question "
    "about the images in full sentences. Rows are counted from the top to the bottom and columns from the left to the "
    "right, beginning with one. Read every code letter by letter, and do not guess what you cannot see. If a place is "
    "empty, say that it shows nothing. Do not say more than what you were asked for."
)
"""The same text as in the reference model's chat template; a test compares them."""
SYSTEMS = (
    DEFAULT_SYSTEM,
    "You are a helpful assistant.",
    "Answer briefly and exactly.",
    "You see one or several pictures. Look at them carefully, then answer.",
    "You are an assistant that reads pictures. Say what you see and nothing else. Read every code letter by letter.",
    "Look at the images with care. Rows are counted from the top, columns from the left. Do not guess.",
    "You answer questions about images.",
)

PHRASINGS: dict[str, tuple[str, ...]] = {
    "cell": (
        "What is in row {r}, column {c}?",
        "What does row {r}, column {c} show?",
        "Tell me what you see in row {r}, column {c}.",
        "Look at row {r}, column {c}. What is there?",
    ),
    "digit_of_colour": (
        "Which digit is {colour}?",
        "What is the {colour} digit?",
        "There is one {colour} digit. Which digit is it?",
    ),
    "colour_of": (
        "What colour is the {thing}?",
        "Which colour does the {thing} have?",
        "Please tell me the colour of the {thing}.",
    ),
    "relation": (
        "What is {side} the {thing}?",
        "Find the {thing}. What is {side} it?",
        "Tell me what you see {side} the {thing}.",
    ),
    "lookup": (
        "Which value belongs to {key}?",
        "What does the table say for {key}?",
        "Please look up {key} in the table.",
    ),
    "read_line": (
        "Read line {r}.",
        "What does line {r} say?",
        "Please read the text on line {r}.",
    ),
    "read_colour": (
        "Read the {colour} text.",
        "What does the {colour} text say?",
        "Please read the text that is written in {colour}.",
    ),
    "list_row": (
        "List row {r}.",
        "What does row {r} show?",
        "Please list everything in row {r}, from left to right.",
    ),
    "list_grid": (
        "List everything, row by row.",
        "Please list all rows.",
        "What does the image show? List it row by row.",
    ),
    "read_page": (
        "Read all the text.",
        "What does the text say? Read every line.",
        "Please read the whole text, line by line.",
    ),
    "count": (
        "How many things are {colour}? Count them row by row.",
        "Count the {colour} things in every row.",
        "Please count what is {colour}, row by row.",
    ),
    "which_image": (
        "Which image has the {thing}?",
        "Which image shows the {thing}?",
        "In which image do you see the {thing}?",
    ),
    "compare": (
        "Compare row {r}, column {c} of image {i} and image {k}.",
        "What is the difference between image {i} and image {k} in row {r}, column {c}?",
        "Look at row {r}, column {c}. How do image {i} and image {k} differ there?",
    ),
    "order": (
        "Which comes first, the {thing} or the {other}?",
        "Do you see the {thing} or the {other} first?",
        "In the order of the images, what comes first: the {thing} or the {other}?",
    ),
}
IN_IMAGE = ("In image {k}: {q}", "Look at image {k}. {q}", "This is about image {k}. {q}")
BEFORE = (*[""] * 15, "I have a question. ", "Please have a close look first. ", "Here is what I want to know. ")
AFTER = (*[""] * 15, " Answer in a full sentence.", " Be exact, please.", " Take your time and look at every detail.")
SIDES = {"right of": (0, 1), "left of": (0, -1), "above": (-1, 0), "below": (1, 0)}

ONE_IMAGE = {
    "grid": {
        "cell": 2.2,
        "digit_of_colour": 1.2,
        "colour_of": 1.3,
        "relation": 1.4,
        "list_row": 1.2,
        "list_grid": 0.6,
        "count": 1.0,
    },
    "text": {"read_line": 2.0, "read_colour": 1.3, "read_page": 1.2},
    "table": {"lookup": 1.0},
}
"""Kind of scene -> question about one image -> how often training asks it."""
SEVERAL_IMAGES = {"which_image": 1.3, "compare": 0.8, "order": 0.7}
"""Questions about several images at once, likewise."""
ACROSS = 0.35
"""How often training asks one of the latter where a prompt has several images."""
SOUGHT = ("colour_of", "relation", "lookup", "which_image", "order")
"""Questions that find a thing by what it is; a model learns it much later than to find it by place or colour."""
LARGEST_LIST = 12
"""Cells of the largest grid that is listed as a whole."""


@dataclass(frozen=True)
class Question:
    """What kind of question it is, its text and its true answer."""

    kind: str
    text: str
    answer: str


Asked = tuple[dict[str, object], str] | None


def _article(content: str) -> str:
    """Return "red star" as "a red star", "orange 4" as "an orange 4", "nothing" unchanged."""
    if content == "nothing":
        return content
    return ("an " if content[0] in "aeiou" else "a ") + content


def _row(scene: Scene, row: int) -> str:
    return ", ".join(scene.cell(row, col) for col in range(1, scene.cols + 1)) + "."


def _thing(value: str) -> str:
    return f"digit {value}" if value in sprites.DIGITS else value


def _only(rng: random.Random, items: Sequence[Item], key: Callable[[Item], str]) -> Item | None:
    """Return a random item whose ``key`` no other item shares, or None."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    single = [group[0] for group in groups.values() if len(group) == 1]
    return rng.choice(single) if single else None


def _cell(rng: random.Random, scene: Scene) -> Asked:
    r, c = rng.randint(1, scene.rows), rng.randint(1, scene.cols)
    return {"r": r, "c": c}, f"Row {r}, column {c} shows {_article(scene.cell(r, c))}."


def _digit_of_colour(rng: random.Random, scene: Scene) -> Asked:
    item = _only(rng, [i for i in scene.items if i.builder == "digit"], lambda i: i.colour)
    return None if item is None else ({"colour": item.colour}, f"The {item.colour} digit is {item.value}.")


def _colour_of(rng: random.Random, scene: Scene) -> Asked:
    item = _only(rng, scene.items, lambda i: i.value)
    if item is None:
        return None
    return {"thing": _thing(item.value)}, f"The {_thing(item.value)} is {item.colour}."


def _relation(rng: random.Random, scene: Scene) -> Asked:
    item = _only(rng, scene.items, lambda i: f"{i.colour} {i.value}")
    if item is None:
        return None
    inside = {
        side: (item.row + down, item.col + right)
        for side, (down, right) in SIDES.items()
        if 1 <= item.row + down <= scene.rows and 1 <= item.col + right <= scene.cols
    }
    side = rng.choice(list(inside))
    thing = f"{item.colour} {item.value}"
    answer = f"{side.capitalize()} the {thing} is {_article(scene.cell(*inside[side]))}."
    return {"side": side, "thing": thing}, answer


def _lookup(rng: random.Random, scene: Scene) -> Asked:
    r = rng.randint(1, scene.rows)
    key = scene.at[r, 1].value
    return {"key": key}, f"The value of {key} is {scene.line(r, 2)}."


def _read_line(rng: random.Random, scene: Scene) -> Asked:
    r = rng.randint(1, scene.rows)
    return {"r": r}, f"Line {r} says {scene.line(r)}."


def _read_colour(rng: random.Random, scene: Scene) -> Asked:
    r = rng.randint(1, scene.rows)
    colour = scene.at[r, 1].colour
    return {"colour": colour}, f"The {colour} text says {scene.line(r)}."


def _list_row(rng: random.Random, scene: Scene) -> Asked:
    r = rng.randint(1, scene.rows)
    return {"r": r}, f"Row {r} shows: {_row(scene, r)}"


def _list_grid(rng: random.Random, scene: Scene) -> Asked:
    if scene.rows * scene.cols > LARGEST_LIST:
        return None
    return {}, "\n".join(f"Row {r}: {_row(scene, r)}" for r in range(1, scene.rows + 1))


def _read_page(rng: random.Random, scene: Scene) -> Asked:
    return {}, "\n".join(f"Line {r}: {scene.line(r)}" for r in range(1, scene.rows + 1))


def _count(rng: random.Random, scene: Scene) -> Asked:
    if not scene.items:
        return None
    colour = rng.choice(scene.items).colour
    rows = [
        [i.value for i in sorted(scene.items, key=lambda i: i.col) if i.row == r and i.colour == colour]
        for r in range(1, scene.rows + 1)
    ]
    lines = [f"Row {r}: {', '.join(row) if row else 'nothing'}." for r, row in enumerate(rows, start=1)]
    return {"colour": colour}, "\n".join([*lines, f"{sum(map(len, rows))} in all."])


ABOUT_ONE: dict[str, Callable[[random.Random, Scene], Asked]] = {
    "cell": _cell,
    "digit_of_colour": _digit_of_colour,
    "colour_of": _colour_of,
    "relation": _relation,
    "lookup": _lookup,
    "read_line": _read_line,
    "read_colour": _read_colour,
    "list_row": _list_row,
    "list_grid": _list_grid,
    "read_page": _read_page,
    "count": _count,
}


def _owners(scenes: Sequence[Scene]) -> dict[str, int]:
    """Return the things that only one image shows: value -> number of the image."""
    found: dict[str, set[int]] = {}
    for k, scene in enumerate(scenes, start=1):
        for item in scene.items if scene.kind == "grid" else ():
            found.setdefault(item.value, set()).add(k)
    return {value: min(where) for value, where in sorted(found.items()) if len(where) == 1}


def _which_image(rng: random.Random, scenes: Sequence[Scene]) -> Asked:
    owners = _owners(scenes)
    if not owners or sum(scene.kind == "grid" for scene in scenes) < 2:
        return None
    value, k = rng.choice(list(owners.items()))
    return {"thing": _thing(value)}, f"The {_thing(value)} is in image {k}."


def _compare(rng: random.Random, scenes: Sequence[Scene]) -> Asked:
    grids = [k for k, scene in enumerate(scenes, start=1) if scene.kind == "grid"]
    if len(grids) < 2:
        return None
    i, k = sorted(rng.sample(grids, 2))
    first, second = scenes[i - 1], scenes[k - 1]
    r, c = rng.randint(1, min(first.rows, second.rows)), rng.randint(1, min(first.cols, second.cols))
    shown = _article(first.cell(r, c)), _article(second.cell(r, c))
    return {"r": r, "c": c, "i": i, "k": k}, f"Image {i} shows {shown[0]} there, and image {k} shows {shown[1]}."


def _order(rng: random.Random, scenes: Sequence[Scene]) -> Asked:
    owners = _owners(scenes)
    pairs = [(a, b) for a in owners for b in owners if owners[a] != owners[b]]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    first = _thing(a if owners[a] < owners[b] else b)
    where = f"The {_thing(a)} is in image {owners[a]} and the {_thing(b)} in image {owners[b]}"
    return {"thing": _thing(a), "other": _thing(b)}, f"{where}, so the {first} comes first."


ABOUT_SEVERAL: dict[str, Callable[[random.Random, Sequence[Scene]], Asked]] = {
    "which_image": _which_image,
    "compare": _compare,
    "order": _order,
}


def ask(rng: random.Random, scenes: Sequence[Scene], kind: str) -> Question | None:
    """Ask a question about the images of one prompt.

    Parameters
    ----------
    rng
        Source of chance.
    scenes
        The images in order. With more than one, a question about one image names it.
    kind
        A key of ``PHRASINGS``.

    Returns
    -------
    Question or None
        None where the scenes do not allow the question.

    Raises
    ------
    ValueError
        If ``kind`` is unknown.
    """
    if kind in ABOUT_SEVERAL:
        asked, k = ABOUT_SEVERAL[kind](rng, scenes) if len(scenes) > 1 else None, 0
    elif kind in ABOUT_ONE:
        fitting = [k for k, scene in enumerate(scenes, start=1) if kind in ONE_IMAGE[scene.kind]]
        if not fitting:
            return None
        k = rng.choice(fitting)
        asked = ABOUT_ONE[kind](rng, scenes[k - 1])
    else:
        raise ValueError(f"unknown kind of question {kind!r}; expected one of {', '.join(PHRASINGS)}")
    if asked is None:
        return None
    values, answer = asked
    text = rng.choice(PHRASINGS[kind]).format(**values)
    if k and len(scenes) > 1:
        text = rng.choice(IN_IMAGE).format(k=k, q=text)
    return Question(kind, rng.choice(BEFORE) + text + rng.choice(AFTER), answer)


def ask_any(rng: random.Random, scenes: Sequence[Scene], sought: float = 1.0) -> Question | None:
    """Ask a question of a random kind.

    As often as ``ONE_IMAGE`` and ``SEVERAL_IMAGES`` say, those in ``SOUGHT`` times ``sought``.
    """
    across = len(scenes) > 1 and rng.random() < ACROSS
    weights = SEVERAL_IMAGES if across else ONE_IMAGE[rng.choice(scenes).kind]
    shares = [share * sought if kind in SOUGHT else share for kind, share in weights.items()]
    return ask(rng, scenes, rng.choices(list(weights), shares)[0])
