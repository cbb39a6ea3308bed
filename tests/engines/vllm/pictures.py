# SPDX-License-Identifier: Apache-2.0
"""The images of requests: files, or pixels that follow from a seed, the same in every process."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse noise: squares of 28 pixels, one for each vision token of the tiny model."""
    chance = random.Random(seed)
    columns, rows = -(-width // 28), -(-height // 28)
    small = Image.frombytes("RGB", (columns, rows), chance.randbytes(3 * columns * rows))
    return small.resize((columns * 28, rows * 28), Image.Resampling.NEAREST).crop((0, 0, width, height))


def load(given: str | Sequence[int]) -> Image.Image:
    """An image of a request: the path of a file, or what `picture` takes."""
    return Image.open(given).convert("RGB") if isinstance(given, str) else picture(*given)


def frames(number: int, width: int, height: int, seed: int) -> np.ndarray:
    """A video, uint8 [number, height, width, 3], whose frames have nothing in common."""
    return np.stack([np.asarray(picture(width, height, 1000 * seed + frame)) for frame in range(number)])
