# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes with their true answers: several phrasings, and a single form of answer, for each kind.

Answers are sentences in which what was asked comes late: the first token of an answer is predicted from the
unpruned prompt, so a one-word answer would not show what pruning lost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .scenes import Item, Scene
from .truths import ABOUT_ONE, ABOUT_SEVERAL, colour_of, colours_of

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
    "colours_of": (
        "What colours are {things}?",
        "Which colours do {things} have?",
        "Please tell me the colours of {things}.",
    ),
    "relation": (
        "What is {side} the {thing}?",
        "Find the {thing}. What is {side} it?",
        "Tell me what you see {side} the {thing}.",
    ),
    "neighbours": (
        "What is around the {thing}?",
        "Find the {thing}. What do you see around it?",
    ),
    "lookup": (
        "Which value belongs to {key}?",
        "What does the table say for {key}?",
        "Please look up {key} in the table.",
    ),
    "lookups": ("Please look up {things} in the table.",),
    "read_table": (
        "Read the whole table.",
        "What does the table say? Read every row.",
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
    "which_images": (
        "Which images have {things}?",
        "In which images do you see {things}?",
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

ONE_IMAGE = {
    "grid": {
        "cell": 1.0,
        "digit_of_colour": 0.5,
        "colour_of": 0.6,
        "colours_of": 1.0,
        "relation": 3.6,
        "neighbours": 1.8,
        "list_row": 0.8,
        "list_grid": 2.4,
        "count": 3.2,
    },
    "text": {"read_line": 1.5, "read_colour": 1.5, "read_page": 2.2, "colours_of": 2.0},
    "table": {"lookup": 1.2, "lookups": 1.8, "read_table": 0.7, "colours_of": 2.0},
}
"""Kind of scene -> question about one image -> how often training asks it.

To find a thing by what it *is* is learned last. Answers that do so several times (``colours_of``, also of letters,
``neighbours``, ``lookups``, ``read_table``, ``which_images``) teach it faster; they are no tasks.
"""
SEVERAL_IMAGES = {"which_image": 0.7, "which_images": 1.4, "compare": 0.8, "order": 1.0}
"""Question about several images at once -> how often training asks it."""
ACROSS = 0.5
"""How often training asks about several images at once where a prompt has several, a fraction."""


@dataclass(frozen=True)
class Question:
    """What kind of question it is, its text and its true answer."""

    kind: str
    text: str
    answer: str


def ask(rng: random.Random, scenes: Sequence[Scene], kind: str) -> Question | None:
    """Ask a question about the images of a prompt.

    Parameters
    ----------
    rng
        Source of chance.
    scenes
        The images in order. Where there are several, a question about a single image names it.
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


def ask_colours(rng: random.Random, items: Sequence[Item], image: int | None = None) -> Question:
    """Ask for the colours of things that are told by what they are.

    Parameters
    ----------
    rng
        Source of chance.
    items
        One thing or more.
    image
        Number of the image that the question names; None where it names none.
    """
    kind = "colour_of" if len(items) == 1 else "colours_of"
    values, answer = colour_of(items[0]) if len(items) == 1 else colours_of(items)
    text = rng.choice(PHRASINGS[kind]).format(**values)
    if image is not None:
        text = rng.choice(IN_IMAGE).format(k=image, q=text)
    return Question(kind, text, answer)


def ask_any(rng: random.Random, scenes: Sequence[Scene]) -> Question | None:
    """Ask a question of a random kind, as often as ``ONE_IMAGE`` and ``SEVERAL_IMAGES`` say."""
    across = len(scenes) > 1 and rng.random() < ACROSS
    weights = SEVERAL_IMAGES if across else ONE_IMAGE[rng.choice(scenes).kind]
    return ask(rng, scenes, rng.choices(list(weights), list(weights.values()))[0])
