# SPDX-License-Identifier: Apache-2.0
"""Images whose pixels follow from a seed, the same in every process."""

from __future__ import annotations

import random

from PIL import Image


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse noise: squares of 28 pixels, one for each vision token of the tiny model."""
    chance = random.Random(seed)
    columns, rows = -(-width // 28), -(-height // 28)
    small = Image.frombytes("RGB", (columns, rows), chance.randbytes(3 * columns * rows))
    return small.resize((columns * 28, rows * 28), Image.Resampling.NEAREST).crop((0, 0, width, height))
