# SPDX-License-Identifier: Apache-2.0
"""What is true of scenes: for each kind of question, something to ask about them and the answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import sprites
from .scenes import Item, Scene

SIDES = {"right of": (0, 1), "left of": (0, -1), "above": (-1, 0), "below": (1, 0)}
LARGEST_LIST = 12
"""Cells of the largest grid that is listed as a whole."""
NUMBERS = ("none", "one", "two", "three", "four", "five")
MOST_THINGS = 4
"""Things that are asked for at once."""

Asked = tuple[dict[str, object], str] | None
"""What the phrasings of a question name, and the answer; None where the scenes do not allow the question."""


def _article(content: str) -> str:
    """Return "red star" as "a red star", "orange 4" as "an orange 4", "nothing" unchanged."""
    if content == "nothing":
        return content
    return ("an " if content[0] in "aeiou" else "a ") + content


def _row(scene: Scene, row: int) -> str:
    return ", ".join(scene.cell(row, col) for col in range(1, scene.cols + 1)) + "."


def _thing(value: str) -> str:
    return f"digit {value}" if value in sprites.DIGITS else value


def _single(items: Sequence[Item], key: Callable[[Item], str]) -> list[Item]:
    """Return the items whose ``key`` no other item shares."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return [group[0] for group in groups.values() if len(group) == 1]


def _only(rng: random.Random, items: Sequence[Item], key: Callable[[Item], str]) -> Item | None:
    """Return a random item whose ``key`` no other item shares, or None."""
    single = _single(items, key)
    return rng.choice(single) if single else None


def _all_of(things: Sequence[str]) -> str:
    """Return "the star, the cross and the digit 2"."""
    *first, last = things
    return f"{', '.join(first)} and {last}"


def _cell_shows(scene: Scene, row: int, col: int) -> str:
    return f"Row {row}, column {col} shows {_article(scene.cell(row, col))}."


def _beside(rng: random.Random, scene: Scene) -> tuple[str, str, dict[str, str]] | None:
    """Return a thing of its own kind, where it is, and for each side of it what is there; None if there is none."""
    item = _only(rng, scene.items, lambda i: f"{i.colour} {i.value}")
    if item is None:
        return None
    thing = f"{item.colour} {item.value}"
    places = {side: (item.row + down, item.col + right) for side, (down, right) in SIDES.items()}
    shown = {
        side: _cell_shows(scene, row, col)
        for side, (row, col) in places.items()
        if 1 <= row <= scene.rows and 1 <= col <= scene.cols
    }
    return thing, f"The {thing} is in row {item.row}, column {item.col}.", shown


def _cell(rng: random.Random, scene: Scene) -> Asked:
    r, c = rng.randint(1, scene.rows), rng.randint(1, scene.cols)
    return {"r": r, "c": c}, _cell_shows(scene, r, c)


def _digit_of_colour(rng: random.Random, scene: Scene) -> Asked:
    item = _only(rng, [i for i in scene.items if i.builder == "digit"], lambda i: i.colour)
    return None if item is None else ({"colour": item.colour}, f"The {item.colour} digit is {item.value}.")


def _colour_of(rng: random.Random, scene: Scene) -> Asked:
    item = _only(rng, scene.items, lambda i: i.value)
    if item is None:
        return None
    return colour_of(item)


def _colours_of(rng: random.Random, scene: Scene) -> Asked:
    items = shown_once(scene)
    if len(items) < 2:
        return None
    return colours_of(rng.sample(items, rng.randint(2, min(MOST_THINGS, len(items)))))


def shown_once(scene: Scene) -> list[Item]:
    """The things of a scene that no other of its things is like, whatever their colours."""
    return _single(scene.items, lambda i: i.value)


def colours_of(items: Sequence[Item]) -> tuple[dict[str, object], str]:
    """What phrasings of a question for the colours of two things or more name, and the answer."""
    said = [f"The {_thing(item.value)} is {item.colour}." for item in items]
    return {"things": _all_of([f"the {_thing(item.value)}" for item in items])}, " ".join(said)


def colour_of(item: Item) -> tuple[dict[str, object], str]:
    """What phrasings of a question for the colour of a thing name, and the answer."""
    return {"thing": _thing(item.value)}, f"The {_thing(item.value)} is {item.colour}."


def _relation(rng: random.Random, scene: Scene) -> Asked:
    surroundings = _beside(rng, scene)
    if surroundings is None:
        return None
    thing, place, shown = surroundings
    side = rng.choice(list(shown))
    return {"side": side, "thing": thing}, f"{place} {shown[side]}"


def _neighbours(rng: random.Random, scene: Scene) -> Asked:
    surroundings = _beside(rng, scene)
    if surroundings is None:
        return None
    thing, place, shown = surroundings
    return {"thing": thing}, " ".join([place, *shown.values()])


def _looked_up(scene: Scene, r: int) -> str:
    key = scene.at[r, 1]
    return f"{key.value} is {key.colour}, on line {NUMBERS[r]}. The value is {scene.line(r, 2)}."


def _lookup(rng: random.Random, scene: Scene) -> Asked:
    r = rng.randint(1, scene.rows)
    return {"key": scene.at[r, 1].value}, _looked_up(scene, r)


def _lookups(rng: random.Random, scene: Scene) -> Asked:
    rows = rng.sample(range(1, scene.rows + 1), rng.randint(2, min(MOST_THINGS - 1, scene.rows)))
    return {"things": _all_of([scene.at[r, 1].value for r in rows])}, " ".join(_looked_up(scene, r) for r in rows)


def _read_table(rng: random.Random, scene: Scene) -> Asked:
    said = [f"The value of {scene.at[r, 1].value} is {scene.line(r, 2)}." for r in range(1, scene.rows + 1)]
    return {}, "\n".join(said)


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
    "colours_of": _colours_of,
    "relation": _relation,
    "neighbours": _neighbours,
    "lookup": _lookup,
    "lookups": _lookups,
    "read_table": _read_table,
    "read_line": _read_line,
    "read_colour": _read_colour,
    "list_row": _list_row,
    "list_grid": _list_grid,
    "read_page": _read_page,
    "count": _count,
}


def _placed(scenes: Sequence[Scene]) -> dict[str, tuple[int, str]]:
    """Return the things that are there once: value -> number of the image that shows it, and how an answer says it."""
    places: dict[str, list[tuple[int, Item]]] = {}
    for k, scene in enumerate(scenes, start=1):
        for item in scene.items if scene.kind == "grid" else ():
            places.setdefault(item.value, []).append((k, item))
    once = {value: at[0] for value, at in sorted(places.items()) if len(at) == 1}
    return {
        value: (k, f"The {_thing(value)} is {item.colour}, in image {NUMBERS[k]}.") for value, (k, item) in once.items()
    }


def _which_image(rng: random.Random, scenes: Sequence[Scene]) -> Asked:
    placed = _placed(scenes)
    if not placed or sum(scene.kind == "grid" for scene in scenes) < 2:
        return None
    value = rng.choice(list(placed))
    return {"thing": _thing(value)}, placed[value][1]


def _which_images(rng: random.Random, scenes: Sequence[Scene]) -> Asked:
    placed = _placed(scenes)
    if len(placed) < 2 or sum(scene.kind == "grid" for scene in scenes) < 2:
        return None
    asked = rng.sample(list(placed), rng.randint(2, min(MOST_THINGS, len(placed))))
    return {"things": _all_of([f"the {_thing(value)}" for value in asked])}, " ".join(placed[v][1] for v in asked)


def _compare(rng: random.Random, scenes: Sequence[Scene]) -> Asked:
    grids = [k for k, scene in enumerate(scenes, start=1) if scene.kind == "grid"]
    if len(grids) < 2:
        return None
    i, k = sorted(rng.sample(grids, 2))
    first, second = scenes[i - 1], scenes[k - 1]
    r, c = rng.randint(1, min(first.rows, second.rows)), rng.randint(1, min(first.cols, second.cols))
    shown = _article(first.cell(r, c)), _article(second.cell(r, c))
    said = (f"Image {n}: row {r}, column {c} shows {what}." for n, what in zip((i, k), shown, strict=True))
    return {"r": r, "c": c, "i": i, "k": k}, " ".join(said)


def _order(rng: random.Random, scenes: Sequence[Scene]) -> Asked:
    placed = _placed(scenes)
    pairs = [(a, b) for a in placed for b in placed if placed[a][0] != placed[b][0]]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    first = _thing(a if placed[a][0] < placed[b][0] else b)
    return {"thing": _thing(a), "other": _thing(b)}, f"{placed[a][1]} {placed[b][1]} The {first} comes first."


ABOUT_SEVERAL: dict[str, Callable[[random.Random, Sequence[Scene]], Asked]] = {
    "which_image": _which_image,
    "which_images": _which_images,
    "compare": _compare,
    "order": _order,
}
