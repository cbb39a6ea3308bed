# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of the tiny models, and random text."""

from __future__ import annotations

import os

import torch

PAD, BOS, EOS = 0, 1, 2
TEXT_IDS = (3, 96)
"""Range of the ids of ordinary text; everything above is special."""
VOCAB = 128
IMAGE, VIDEO, START, END, BREAK, TAG, VIDEO_START, VIDEO_END = range(110, 118)
INDICATORS = tuple(range(118, 123))
SPECIAL = tuple(range(TEXT_IDS[1], VOCAB))

Tokens = list[int]

_SEED = int(os.environ.get("PLPHP_TEST_SEED", "0"))


def seeded(seed: int) -> torch.Generator:
    """Return a generator; PLPHP_TEST_SEED draws all weights and inputs anew: what then fails held by luck."""
    return torch.Generator().manual_seed(shifted(seed))


def shifted(seed: int) -> int:
    """Return the seed that PLPHP_TEST_SEED makes of a test's seed."""
    return seed + 1000 * _SEED


def random_text(count: int, generator: torch.Generator) -> Tokens:
    """Draw tokens of ordinary text."""
    return torch.randint(*TEXT_IDS, (count,), generator=generator).tolist()
