# SPDX-License-Identifier: Apache-2.0
"""Masks of the things that scenes are made of: handwritten digits, shapes and printed characters.

Every mask is built once at ``SUPERSAMPLE`` times the size of the drawing and box-filtered down, so that a scene drawn
large and resized by an image processor looks like the same scene drawn small.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from plphp.errors import BackendUnavailableError

Key = tuple[Any, ...]
Mask = NDArray[np.float32]
NEEDED = "The tasks draw digits of scikit-learn and fonts of matplotlib: pip install 'plphp[eval]'."
SUPERSAMPLE = 4
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart")
CHARACTERS = tuple("ACEFHJKLMNPRTUVWXY234679")
"""Characters of printed codes: look-alikes (O/0, I/1, B/8, S/5, Z/2, ...) are left out."""
FONTS = {
    "train": (
        "DejaVuSans-Bold.ttf",
        "DejaVuSans.ttf",
        "DejaVuSansMono-Bold.ttf",
        "DejaVuSerif-Bold.ttf",
        "DejaVuSerif.ttf",
        "STIXGeneralBol.ttf",
    ),
    "dev": ("cmss10.ttf",),
    "test": ("DejaVuSansMono.ttf", "STIXGeneral.ttf"),
}
"""Printed characters of every split: no two share a font file."""
LETTERS = tuple(c for c in CHARACTERS if c.isalpha())
VARIANTS = 12
HELD_OUT = {"dev": 0.1, "test": 0.2}
"""Share of the handwritten digits that each held-out split takes."""


@lru_cache(maxsize=3)
def _digit_images(split: str) -> dict[int, NDArray[np.uint8]]:
    """Return the handwritten digits of a split as ``{label: uint8 (n, 8, 8)}`` (a fixed random split)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BackendUnavailableError(NEEDED) from error

    data = load_digits()
    order = np.random.RandomState(20).permutation(len(data.target))
    test, dev = (int(len(order) * HELD_OUT[name]) for name in ("test", "dev"))
    numbers = {"test": order[:test], "dev": order[test : test + dev], "train": order[test + dev :]}[split]
    images = (data.images[numbers] * (255 / 16)).astype(np.uint8)
    labels = data.target[numbers]
    return {k: images[labels == k] for k in range(10)}


@lru_cache(maxsize=16)
def _font_path(file: str) -> str:
    try:
        import matplotlib
    except ImportError as error:
        raise BackendUnavailableError(NEEDED) from error
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file)


def _affine(image: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    """Rotate, shear and stretch a little around the centre."""
    angle = (rng.random() - 0.5) * 0.5 * strength
    shear = (rng.random() - 0.5) * 0.35 * strength
    sx, sy = (1 + (rng.random() - 0.5) * 0.3 * strength for _ in range(2))
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = cos * sx, (-sin + shear) * sx, sin * sy, cos * sy
    c = image.size[0] / 2
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, c - a * c - b * c, d, e, c - d * c - e * c),
        Image.Resampling.BILINEAR,
    )


@lru_cache(maxsize=40_000)
def _digit_mask(split: str, label: int, index: int, variant: int, size: int) -> Image.Image:
    small = Image.fromarray(_digit_images(split)[label][index])
    big = small.resize((32, 32), Image.Resampling.BICUBIC)
    if split == "train" and variant:
        big = _affine(big, random.Random(f"{label}-{index}-{variant}"), 1.0)
    big = big.point(lambda v: min(255, int(v * 1.25)))
    return big.resize((size * SUPERSAMPLE,) * 2, Image.Resampling.BICUBIC)


@lru_cache(maxsize=20_000)
def _shape_mask(name: str, variant: int, size: int) -> Image.Image:
    rng = random.Random(f"{name}-{variant}")
    side = size * SUPERSAMPLE
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    c, r, rot = side / 2, side * (0.38 + 0.08 * rng.random()), (rng.random() - 0.5) * 0.4

    def point(angle: float, radius: float = 1.0) -> tuple[float, float]:
        return c + radius * r * math.cos(angle + rot), c + radius * r * math.sin(angle + rot)

    if name == "circle":
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
    elif name == "square":
        draw.polygon([point(math.pi / 4 + i * math.pi / 2, 1.1) for i in range(4)], fill=255)
    elif name == "diamond":
        draw.polygon([(c, c - r * 1.1), (c + r * 0.65, c), (c, c + r * 1.1), (c - r * 0.65, c)], fill=255)
    elif name == "triangle":
        draw.polygon([point(-math.pi / 2 + i * 2 * math.pi / 3, 1.1) for i in range(3)], fill=255)
    elif name == "star":
        draw.polygon([point(-math.pi / 2 + i * math.pi / 5, 0.45 if i % 2 else 1.15) for i in range(10)], fill=255)
    elif name == "cross":
        w = r * 0.32
        for angle in (rot, rot + math.pi / 2):
            ca, sa = math.cos(angle), math.sin(angle)
            corners = ((-r, -w), (r, -w), (r, w), (-r, w))
            draw.polygon([(c + x * ca - y * sa, c + x * sa + y * ca) for x, y in corners], fill=255)
    elif name == "heart":
        q = r * 0.55
        draw.ellipse((c - 1.9 * q, c - r * 0.8, c + 0.1 * q, c - r * 0.8 + 2 * q), fill=255)
        draw.ellipse((c - 0.1 * q, c - r * 0.8, c + 1.9 * q, c - r * 0.8 + 2 * q), fill=255)
        draw.polygon([(c - 1.85 * q, c - r * 0.05), (c + 1.85 * q, c - r * 0.05), (c, c + r)], fill=255)
    else:
        raise ValueError(f"unknown shape {name!r}; expected one of {SHAPES}")
    return image


@lru_cache(maxsize=20_000)
def _character_mask(character: str, font_file: str, size: int, style: int) -> Image.Image:
    font = ImageFont.truetype(_font_path(font_file), size * SUPERSAMPLE)
    left, top, right, bottom = font.getbbox(character)
    # Sizes are multiples of SUPERSAMPLE, so that the box filter below has whole pixels.
    width = -(-int(right - left) // SUPERSAMPLE) * SUPERSAMPLE
    height = -(-int(bottom - top) // SUPERSAMPLE) * SUPERSAMPLE
    image = Image.new("L", (width, height), 0)
    ImageDraw.Draw(image).text((-left, height - (bottom - top) - top), character, fill=255, font=font)
    return _styled(image, random.Random(f"{font_file}-{style}")) if style else image


def _styled(image: Image.Image, rng: random.Random) -> Image.Image:
    """Make a character narrower or wider, slanted a little, thinner or bolder: as another font would."""
    stretch, slant = 0.82 + 0.28 * rng.random(), (rng.random() - 0.5) * 0.3
    weight = rng.choice((None, ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3)))
    width, height = image.size
    wider = max(1, round(width * stretch / SUPERSAMPLE)) * SUPERSAMPLE
    image = image.resize((wider, height), Image.Resampling.BICUBIC)
    image = image.transform(
        image.size, Image.Transform.AFFINE, (1, slant, -slant * height / 2, 0, 1, 0), Image.Resampling.BILINEAR
    )
    return image.filter(weight) if weight else image


@lru_cache(maxsize=60_000)
def _as_array(builder: str, key: Key, scale: int) -> Mask:
    image = {"digit": _digit_mask, "shape": _shape_mask, "character": _character_mask}[builder](*key)
    if scale != SUPERSAMPLE:
        factor = SUPERSAMPLE // scale
        image = image.resize((image.size[0] // factor, image.size[1] // factor), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / np.float32(255)


def digit_count(split: str, label: int) -> int:
    """Return how many samples of a digit a split (``"train"``, ``"dev"`` or ``"test"``) holds."""
    return len(_digit_images(split)[label])


def mask(builder: str, key: Key, scale: int = 1) -> Mask:
    """Return the opacity of a sprite.

    Parameters
    ----------
    builder
        ``"digit"`` with key (split, label, index, variant, size), ``"shape"`` with key (name, variant, size)
        or ``"character"`` with key (character, font file, size, style; 0: the font as it is); sizes in pixels
        at scale 1.
    key
        The arguments of the builder.
    scale
        1, 2 or 4 pixels per unit.

    Returns
    -------
    numpy.ndarray
        float32 of shape (height, width), from 0 to 1.
    """
    return _as_array(builder, key, scale)
