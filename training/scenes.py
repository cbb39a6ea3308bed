# SPDX-License-Identifier: Apache-2.0
"""Seeded synthetic scenes with known content: grids of coloured digits and shapes, pages of printed codes.

A scene is a layout in units of 1/80 of the image side. ``Scene.draw(scale)`` renders it at three sizes,
so that training images (80 x 80), held-out images and example files (320 x 320) are the same kind of scene.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from training import sprites

SIDE = 80
PATCH = 8
PATCHES = SIDE // PATCH
COLOURS = {
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
MAX_ROWS, MAX_COLS = 4, 5


@dataclass(frozen=True)
class Item:
    """One drawn thing: what it is, its colour, its cell or place in a line (1-based), where it is drawn."""

    builder: str
    key: tuple
    value: str
    colour: str
    rgb: tuple[int, int, int]
    row: int
    col: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A grid (``kind="grid"``, some cells empty) or a page of codes (``kind="text"``, one per line)."""

    kind: str
    rows: int
    cols: int
    background: tuple[int, int, int]
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

    def line(self, row: int) -> str:
        """Return the code printed on a line of a text scene."""
        return "".join(self.at[row, col].value for col in range(1, MAX_COLS + 1) if (row, col) in self.at)

    def draw(self, scale: int = 1) -> Image.Image:
        """Render the scene as an RGB image of ``80 * scale`` pixels a side (scale 1, 2 or 4)."""
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

    def patch_labels(self) -> np.ndarray:
        """Return int64 (10, 10, 4): class in ``OBJECTS``, colour, row and column (0: none) of every patch."""
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
                    fill(x - 6, y - 6, x + 6, y + 6, (1, 0, row, col))
        for item in self.items:
            height, width = sprites.mask(item.builder, item.key).shape
            x, y = item.x + width / 2, item.y + height / 2
            # At least one patch centre must fall inside, also for a narrow character.
            w, h = max(width / 2, PATCH / 2 + 0.01), max(height / 2, PATCH / 2 + 0.01)
            value = (OBJECTS.index(item.value), list(COLOURS).index(item.colour) + 1, item.row, item.col)
            fill(x - w, y - h, x + w, y + h, value)
        return labels


def _colour(rng: random.Random, name: str) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-15, 15))) for c in COLOURS[name])
    return r, g, b


def _common(rng: random.Random) -> dict:
    shade = rng.randint(0, 35)
    background = tuple(min(255, max(0, shade + rng.randint(-8, 8))) for _ in range(3))
    noise = rng.random() * 5 if rng.random() < 0.6 else 0.0
    return {
        "background": background,
        "line_shade": rng.randint(25, 50),
        "noise": noise,
        "noise_seed": rng.getrandbits(31),
    }


def make_grid(rng: random.Random, split: str, max_side: int = 4, empty: float = 0.2) -> Scene:
    """Draw a random grid layout of 2 to ``max_side`` rows and columns.

    Parameters
    ----------
    rng
        The only source of chance: the same state gives the same scene.
    split
        ``"train"`` or ``"test"``: which handwritten digits may appear.
    max_side
        Most rows and columns (at most 4).
    empty
        Probability that a cell is empty (a fraction).
    """
    rows, cols = rng.randint(2, max_side), rng.randint(2, max_side)
    height, width = SIDE / rows, SIDE / cols
    items = []
    for row in range(1, rows + 1):
        for col in range(1, cols + 1):
            if rng.random() < empty:
                continue
            colour = rng.choice(list(COLOURS))
            size = int(min(height, width, 34) * (0.78 + 0.14 * rng.random()))
            x = (col - 1) * width + (width - size) * (0.5 + (rng.random() - 0.5) * 0.7)
            y = (row - 1) * height + (height - size) * (0.5 + (rng.random() - 0.5) * 0.7)
            if rng.random() < 0.45:
                value = rng.choice(sprites.DIGITS)
                index = rng.randrange(sprites.digit_count(split, int(value)))
                builder, key = "digit", (split, int(value), index, rng.randrange(sprites.VARIANTS), size)
            else:
                value = rng.choice(sprites.SHAPES)
                builder, key = "shape", (value, rng.randrange(sprites.VARIANTS), size)
            items.append(Item(builder, key, value, colour, _colour(rng, colour), row, col, round(x), round(y)))
    return Scene("grid", rows, cols, items=tuple(items), **_common(rng))


def make_text(rng: random.Random, split: str = "train", max_lines: int = 3) -> Scene:
    """Draw a random page of 1 to ``max_lines`` lines, each a code of 3 to 5 characters in its own colour."""
    lines = rng.randint(1, max_lines)
    colours = rng.sample(list(COLOURS), lines)
    height = SIDE / lines
    items = []
    for row in range(1, lines + 1):
        length = rng.randint(3, MAX_COLS)
        font, size = rng.randrange(len(sprites.FONTS)), rng.randint(14, 17)
        keys = [(rng.choice(sprites.CHARACTERS), font, size) for _ in range(length)]
        shapes = [sprites.mask("character", key).shape for key in keys]
        widest, tallest = max(w for _, w in shapes), max(h for h, _ in shapes)
        advance = min((SIDE - 2) / length, widest + 1 + rng.random() * 2.5)
        left = 1 + rng.random() * max(0.0, SIDE - 2 - advance * length)
        top = (row - 1) * height + 1 + rng.random() * max(0.0, height - tallest - 2)
        rgb = _colour(rng, colours[row - 1])
        for col, (key, (h, w)) in enumerate(zip(keys, shapes, strict=True), start=1):
            x = left + (col - 1) * advance + max(0.0, (advance - w) / 2)
            x = min(SIDE - w, max(0, round(x)))
            y = min(SIDE - h, round(top + tallest - h))
            items.append(Item("character", key, key[0], colours[row - 1], rgb, row, col, x, y))
    return Scene("text", lines, MAX_COLS, items=tuple(items), **_common(rng))


def make_scenes(rng: random.Random, split: str, n: int = 1, *, grids: float = 0.6, easy: bool = False) -> list[Scene]:
    """Draw ``n`` scenes for one prompt; among several, each one holds less."""
    small = easy or n > 1
    scenes = []
    for _ in range(n):
        if rng.random() < grids:
            scenes.append(make_grid(rng, split, max_side=3 if small else 4))
        else:
            scenes.append(make_text(rng, split, max_lines=2 if small else 3))
    return scenes


def training_pixels(rng: random.Random, scene: Scene) -> np.ndarray:
    """Draw a scene as the image processor would deliver it, with light augmentation.

    Returns
    -------
    numpy.ndarray
        uint8 of shape (80, 80, 3).
    """
    image = scene.draw(rng.choice((1, 1, 1, 2, 4)))
    if image.size[0] == SIDE and rng.random() < 0.2:
        side = rng.randint(60, 160)
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
