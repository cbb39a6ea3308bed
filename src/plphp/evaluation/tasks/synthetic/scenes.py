# SPDX-License-Identifier: Apache-2.0
"""Seeded synthetic scenes with known content: grids of coloured things, pages of printed codes, tables.

A scene is a layout in units of 1/112 of the image side. ``Scene.draw(scale)`` renders it at three sizes,
so that training images (112 x 112), held-out images and example files (448 x 448) are the same kind of scene.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import sprites

Split = Literal["train", "dev", "test"]
Kind = Literal["grid", "text", "table"]
Colour = tuple[int, int, int]

SIDE = 112
PATCH = 8
PATCHES = SIDE // PATCH
COLOURS: dict[str, Colour] = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 240),
    "yellow": (235, 220, 40),
    "purple": (165, 60, 210),
    "orange": (245, 140, 30),
    "cyan": (50, 215, 220),
    "white": (240, 240, 240),
}
OBJECTS = ("background", "nothing", *sprites.DIGITS, *sprites.SHAPES, *sprites.CHARACTERS[:18])
"""Classes of the patch labels; the digits of printed codes share the class of the handwritten ones."""
MAX_ROWS, MAX_COLS = 5, 6
LARGEST_THING = 26
"""Side of the largest thing of a grid, in pixels at scale 1: a few patches."""
UNSEEN_LAYOUTS = frozenset({(2, 4), (3, 5), (4, 3), (5, 2), (5, 4)})
"""Grids of (rows, columns) that no training scene has."""


@dataclass(frozen=True)
class Item:
    """A drawn thing: what it is, its colour, its cell or place in a line (1-based), where it is drawn."""

    builder: str
    key: sprites.Key
    value: str
    colour: str
    rgb: Colour
    row: int
    col: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A grid (some cells empty), a page of codes (``"text"``, a code a line), or a ``"table"`` of keys and values."""

    kind: Kind
    rows: int
    cols: int
    background: Colour
    items: tuple[Item, ...]
    line_shade: int = 0
    noise: float = 0.0
    noise_seed: int = 0
    at: dict[tuple[int, int], Item] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", {(item.row, item.col): item for item in self.items})

    def cell(self, row: int, col: int) -> str:
        """Return the content of a grid cell as words, for example ``"red star"`` or ``"nothing"``."""
        item = self.at.get((row, col))
        return f"{item.colour} {item.value}" if item else "nothing"

    def line(self, row: int, start: int = 1) -> str:
        """Return what is printed on a line from a place on: of a table, the key stands at 1 and the value from 2."""
        return "".join(self.at[row, col].value for col in range(start, MAX_COLS + 1) if (row, col) in self.at)

    def draw(self, scale: int = 1) -> Image.Image:
        """Render the scene as an RGB image of ``112 * scale`` pixels a side (scale 1, 2 or 4)."""
        side = SIDE * scale
        canvas = np.empty((side, side, 3), np.float32)
        canvas[:] = self.background
        if self.kind == "grid":
            for i in range(1, self.rows):
                top = round(i * SIDE / self.rows) * scale
                canvas[top : top + scale] += self.line_shade
            for i in range(1, self.cols):
                left = round(i * SIDE / self.cols) * scale
                canvas[:, left : left + scale] += self.line_shade
        for item in self.items:
            opacity = sprites.mask(item.builder, item.key, scale)
            x, y = item.x * scale, item.y * scale
            opacity = opacity[: side - y, : side - x, None]
            region = canvas[y : y + opacity.shape[0], x : x + opacity.shape[1]]
            region *= 1 - opacity
            region += opacity * np.asarray(item.rgb, np.float32)
        if self.noise:
            canvas += np.random.default_rng(self.noise_seed).standard_normal(canvas.shape, np.float32) * self.noise
        return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))

    def patch_labels(self) -> NDArray[np.int64]:
        """Return int64 (14, 14, 4): class in ``OBJECTS``, colour, row and column (0: none) of every patch."""
        labels = np.zeros((PATCHES, PATCHES, 4), np.int64)

        def fill(x0: float, y0: float, x1: float, y1: float, value: tuple[int, int, int, int]) -> None:
            half = PATCH / 2
            left, right = (
                max(0, math.ceil((x0 - half) / PATCH)),
                min(PATCHES - 1, math.floor((x1 - half) / PATCH)),
            )
            top, bottom = (
                max(0, math.ceil((y0 - half) / PATCH)),
                min(PATCHES - 1, math.floor((y1 - half) / PATCH)),
            )
            labels[top : bottom + 1, left : right + 1] = value

        if self.kind == "grid":
            height, width = SIDE / self.rows, SIDE / self.cols
            for row in range(1, self.rows + 1):
                for col in range(1, self.cols + 1):
                    x, y = (col - 0.5) * width, (row - 0.5) * height
                    fill(x - 7, y - 7, x + 7, y + 7, (1, 0, row, col))
        for item in self.items:
            height, width = sprites.mask(item.builder, item.key).shape
            x, y = item.x + width / 2, item.y + height / 2
            # At least one patch centre must fall inside, also for a narrow character.
            w, h = max(width / 2, PATCH / 2 + 0.01), max(height / 2, PATCH / 2 + 0.01)
            value = (OBJECTS.index(item.value), list(COLOURS).index(item.colour) + 1, item.row, item.col)
            fill(x - w, y - h, x + w, y + h, value)
        return labels


def _colour(rng: random.Random, name: str) -> Colour:
    r, g, b = (min(255, max(0, c + rng.randint(-15, 15))) for c in COLOURS[name])
    return r, g, b


def _common(rng: random.Random) -> dict[str, Any]:
    shade = rng.randint(0, 35)
    background = tuple(min(255, max(0, shade + rng.randint(-8, 8))) for _ in range(3))
    noise = rng.random() * 5 if rng.random() < 0.6 else 0.0
    return {
        "background": background,
        "line_shade": rng.randint(25, 50),
        "noise": noise,
        "noise_seed": rng.getrandbits(31),
    }


def _layout(rng: random.Random, split: Split, max_side: int) -> tuple[int, int]:
    sides = range(2, max_side + 1)
    layouts = [(r, c) for r in sides for c in sides if split != "train" or (r, c) not in UNSEEN_LAYOUTS]
    unseen = [layout for layout in layouts if layout in UNSEEN_LAYOUTS]
    return rng.choice(unseen if unseen and rng.random() < 0.5 else layouts)


def make_grid(rng: random.Random, split: Split, max_side: int = 5, empty: float = 0.2) -> Scene:
    """Draw a random grid of 2 to ``max_side`` rows and columns.

    Held-out splits take a layout that training never shows in most cases.

    Parameters
    ----------
    rng
        The only source of chance: the same state gives the same scene.
    split
        Which handwritten digits and layouts may appear.
    max_side
        Most rows and columns (at most 5).
    empty
        Probability that a cell is empty (a fraction).
    """
    rows, cols = _layout(rng, split, max_side)
    height, width = SIDE / rows, SIDE / cols
    items = []
    for row in range(1, rows + 1):
        for col in range(1, cols + 1):
            if rng.random() < empty:
                continue
            colour = rng.choice(list(COLOURS))
            size = int(min(height, width, LARGEST_THING) * (0.78 + 0.14 * rng.random()))
            x = (col - 1) * width + (width - size) * (0.5 + (rng.random() - 0.5) * 0.7)
            y = (row - 1) * height + (height - size) * (0.5 + (rng.random() - 0.5) * 0.7)
            if rng.random() < 0.45:
                value = rng.choice(sprites.DIGITS)
                index = rng.randrange(sprites.digit_count(split, int(value)))
                builder: str = "digit"
                key: sprites.Key = (split, int(value), index, rng.randrange(sprites.VARIANTS), size)
            else:
                value = rng.choice(sprites.SHAPES)
                builder, key = "shape", (value, rng.randrange(sprites.VARIANTS), size)
            items.append(Item(builder, key, value, colour, _colour(rng, colour), row, col, round(x), round(y)))
    return Scene("grid", rows, cols, items=tuple(items), **_common(rng))


def _print_line(
    rng: random.Random, text: str, face: tuple[str, int, int], colour: str, row: int, lines: int, gap: float = 0.0
) -> list[Item]:
    """Set a line of characters at a random place of its strip; ``gap`` pixels follow the first character.

    A face is a font, a size and a style, see ``sprites.mask``.
    """
    keys = [(character, *face) for character in text]
    shapes = [sprites.mask("character", key).shape for key in keys]
    widest, tallest = max(w for _, w in shapes), max(h for h, _ in shapes)
    advance = min((SIDE - 2 - gap) / len(text), widest + 1 + rng.random() * 2.5)
    left = 1 + rng.random() * max(0.0, SIDE - 2 - gap - advance * len(text))
    height = SIDE / lines
    top = (row - 1) * height + 1 + rng.random() * max(0.0, height - tallest - 2)
    rgb = _colour(rng, colour)
    items = []
    for col, (key, (h, w)) in enumerate(zip(keys, shapes, strict=True), start=1):
        x = left + (col - 1) * advance + (gap if col > 1 else 0.0) + max(0.0, (advance - w) / 2)
        place = min(SIDE - w, max(0, round(x))), min(SIDE - h, round(top + tallest - h))
        items.append(Item("character", key, key[0], colour, rgb, row, col, *place))
    return items


def _style(rng: random.Random, split: Split) -> int:
    """Return how a line of training is changed to look like other fonts; held-out fonts stay as they are."""
    return rng.randrange(sprites.VARIANTS) if split == "train" else 0


def make_text(rng: random.Random, split: Split, max_lines: int = 4) -> Scene:
    """Draw a random page of 1 to ``max_lines`` lines, each a code of 3 to 6 characters in its own colour."""
    lines = rng.randint(1, max_lines)
    colours = rng.sample(list(COLOURS), lines)
    items = []
    for row in range(1, lines + 1):
        text = "".join(rng.choice(sprites.CHARACTERS) for _ in range(rng.randint(3, MAX_COLS)))
        face = rng.choice(sprites.FONTS[split]), rng.randint(14, 17), _style(rng, split)
        items += _print_line(rng, text, face, colours[row - 1], row, lines)
    return Scene("text", lines, MAX_COLS, items=tuple(items), **_common(rng))


def make_table(rng: random.Random, split: Split, max_lines: int = 5) -> Scene:
    """Draw a random table of 2 to ``max_lines`` lines: a letter of its own and a value of 2 or 3 places each."""
    lines = rng.randint(2, max_lines)
    keys = rng.sample(sprites.LETTERS, lines)
    items = []
    font = rng.choice(sprites.FONTS[split])
    for row, key in enumerate(keys, start=1):
        value = "".join(rng.choice(sprites.CHARACTERS) for _ in range(rng.randint(2, 3)))
        colour, size, gap = rng.choice(list(COLOURS)), rng.randint(14, 16), 14 + rng.random() * 12
        items += _print_line(rng, key + value, (font, size, _style(rng, split)), colour, row, lines, gap)
    return Scene("table", lines, MAX_COLS, items=tuple(items), **_common(rng))


def make_scene(rng: random.Random, split: Split, kind: Kind, largest: int = 5) -> Scene:
    """Draw a scene of a kind, with at most ``largest`` (3 to 5) rows and columns."""
    if kind == "grid":
        return make_grid(rng, split, max_side=largest)
    if kind == "text":
        return make_text(rng, split, max_lines=largest - 1)
    return make_table(rng, split, max_lines=largest)


def make_scenes(
    rng: random.Random,
    split: Split,
    n: int = 1,
    *,
    largest: int = 5,
    kinds: Sequence[Kind] = ("grid", "grid", "grid", "grid", "text", "text", "table"),
) -> list[Scene]:
    """Draw ``n`` scenes for a prompt, each of a kind out of ``kinds``; where there are several, each holds less."""
    return [make_scene(rng, split, rng.choice(kinds), min(largest, 4) if n > 1 else largest) for _ in range(n)]


def training_pixels(rng: random.Random, scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene as the image processor would deliver it, with light augmentation.

    Returns
    -------
    numpy.ndarray
        uint8 of shape (112, 112, 3).
    """
    image = scene.draw(rng.choice((1, 1, 1, 1, 2, 4)))
    if image.size[0] == SIDE and rng.random() < 0.2:
        side = rng.randint(84, 224)
        image = image.resize((side, side), rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)))
    if rng.random() < 0.05:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(75, 95))
        image = Image.open(buffer).convert("RGB")
    if image.size[0] != SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if rng.random() < 0.3:
        gain, shift = 0.9 + 0.2 * rng.random(), rng.randint(-6, 12)
        pixels = np.clip(pixels * np.float32(gain) + shift, 0, 255).astype(np.uint8)
    return pixels
