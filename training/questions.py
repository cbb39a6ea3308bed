# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes with their true answers: several phrasings, one form of answer per task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from training import sprites
from training.scenes import Item, Scene

DEFAULT_SYSTEM = "You are a careful assistant. Answer the question about the images in full sentences."
"""The same text as in ``chat_template.jinja``; a test compares them."""
SYSTEMS = (
    DEFAULT_SYSTEM,
    "You are a helpful assistant.",
    "Answer briefly and exactly.",
    "You see one or several pictures. Look at them carefully, then answer.",
    "You are an assistant that reads pictures. Say what you see and nothing else.",
    "Look at the images with care. Do not guess.",
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
    "read_page": (
        "Read all the text.",
        "What does the text say? Read every line.",
        "Please read the whole text, line by line.",
    ),
    "which_image": (
        "Which image has the {thing}?",
        "Which image shows the {thing}?",
        "In which image do you see the {thing}?",
    ),
}
IN_IMAGE = ("In image {k}: {q}", "Look at image {k}. {q}", "This is about image {k}. {q}")
GRID_TASKS = {"cell": 2.5, "digit_of_colour": 1.5, "colour_of": 1.5, "list_row": 1.6, "list_grid": 0.8}
TEXT_TASKS = {"read_line": 2.0, "read_colour": 1.5, "read_page": 1.2}


@dataclass(frozen=True)
class Question:
    """A task name, the question's text and its true answer."""

    task: str
    text: str
    answer: str


def _weighted(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _article(content: str) -> str:
    """Return "red star" as "a red star", "orange 4" as "an orange 4", "nothing" unchanged."""
    if content == "nothing":
        return content
    return ("an " if content[0] in "aeiou" else "a ") + content


def _row(scene: Scene, row: int) -> str:
    return ", ".join(scene.cell(row, col) for col in range(1, scene.cols + 1)) + "."


def _thing(value: str) -> str:
    return f"digit {value}" if value in sprites.DIGITS else value


def _only(rng: random.Random, items: Sequence[Item], key) -> Item | None:
    """Return a random item whose ``key`` no other item shares, or None."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    single = [group[0] for group in groups.values() if len(group) == 1]
    return rng.choice(single) if single else None


def ask_one(rng: random.Random, scene: Scene, task: str) -> tuple[str, str] | None:
    """Return (question, answer) of a task about one scene, or None where the scene does not allow it."""
    values: dict[str, object] = {}
    if task == "cell":
        r, c = rng.randint(1, scene.rows), rng.randint(1, scene.cols)
        values, answer = {"r": r, "c": c}, f"Row {r}, column {c} shows {_article(scene.cell(r, c))}."
    elif task == "digit_of_colour":
        item = _only(rng, [i for i in scene.items if i.builder == "digit"], lambda i: i.colour)
        if item is None:
            return None
        values, answer = {"colour": item.colour}, f"The {item.colour} digit is {item.value}."
    elif task == "colour_of":
        item = _only(rng, scene.items, lambda i: i.value)
        if item is None:
            return None
        thing = _thing(item.value)
        values, answer = {"thing": thing}, f"The {thing} is {item.colour}."
    elif task == "list_row":
        r = rng.randint(1, scene.rows)
        values, answer = {"r": r}, f"Row {r} shows: {_row(scene, r)}"
    elif task == "list_grid":
        answer = "\n".join(f"Row {r}: {_row(scene, r)}" for r in range(1, scene.rows + 1))
    elif task == "read_line":
        r = rng.randint(1, scene.rows)
        values, answer = {"r": r}, f"Line {r} says {scene.line(r)}."
    elif task == "read_colour":
        r = rng.randint(1, scene.rows)
        colour = scene.at[r, 1].colour
        values, answer = {"colour": colour}, f"The {colour} text says {scene.line(r)}."
    elif task == "read_page":
        answer = "\n".join(f"Line {r}: {scene.line(r)}" for r in range(1, scene.rows + 1))
    else:
        raise ValueError(f"unknown task {task!r}; expected one of {sorted(PHRASINGS)}")
    return rng.choice(PHRASINGS[task]).format(**values), answer


def ask(rng: random.Random, scenes: Sequence[Scene], task: str | None = None) -> Question | None:
    """Ask a random question about the images of one prompt.

    Parameters
    ----------
    rng
        Source of chance.
    scenes
        The images in order. With more than one, questions name the image, or ask which image shows a thing.
    task
        Ask only this task (a key of ``PHRASINGS``).

    Returns
    -------
    Question or None
        None where the scenes do not allow the task that was drawn.
    """
    several = len(scenes) > 1
    if task == "which_image" or (task is None and several and rng.random() < 0.25):
        found: dict[str, set[int]] = {}
        for k, scene in enumerate(scenes, start=1):
            for item in scene.items:
                if scene.kind == "grid":
                    found.setdefault(item.value, set()).add(k)
        unique = sorted((value, min(where)) for value, where in found.items() if len(where) == 1)
        if not unique or sum(scene.kind == "grid" for scene in scenes) < 2:
            return None
        value, k = rng.choice(unique)
        thing = _thing(value)
        text = rng.choice(PHRASINGS["which_image"]).format(thing=thing)
        return Question("which_image", text, f"The {thing} is in image {k}.")
    candidates = [k for k, s in enumerate(scenes) if task is None or (task in GRID_TASKS) == (s.kind == "grid")]
    if not candidates:
        return None
    k = rng.choice(candidates)
    scene = scenes[k]
    weights = GRID_TASKS if scene.kind == "grid" else TEXT_TASKS
    name = task or _weighted(rng, weights)
    asked = ask_one(rng, scene, name)
    if asked is None:
        return None
    text, answer = asked
    if several:
        text = rng.choice(IN_IMAGE).format(k=k + 1, q=text)
    return Question(name, text, answer)
