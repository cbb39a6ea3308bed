# SPDX-License-Identifier: Apache-2.0
"""What stock ``generate`` does right with each model, per version of transformers."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from packaging.version import Version

NEWEST = Version(transformers.__version__) >= Version("5.23")
"""5.23 encodes images before prefill; 5.17, the oldest supported, encodes them inside of it."""

ANY = 99
"""No limit on the images of a row."""


@dataclass(frozen=True)
class Stock:
    """What stock ``generate`` does right, as measured; elsewhere it raises or is silently wrong.

    Parameters
    ----------
    second_turn : bool
        A later turn of text equals the whole conversation as a prompt. PaliGemma reads a prompt bidirectionally: it
        cannot.
    second_turn_image : bool
        A later turn with new images, as `TinyFamily.second_turn` returns it, equals the whole conversation as a prompt.
    chunked_prefill, chunked_video : bool
        ``prefill_chunk_size`` gives the logits of a single forward. 5.17 drops the images: no family is right.
    expanded_images, expanded_videos : int
        The most images of a row that beam search and ``num_return_sequences`` repeat in the right order.
    """

    second_turn: bool = True
    second_turn_image: bool = True
    chunked_prefill: bool = NEWEST
    chunked_video: bool = NEWEST
    expanded_images: int = ANY if NEWEST else 1
    expanded_videos: int = ANY if NEWEST else 1


USUAL = Stock()
REPEATED = Stock(expanded_images=ANY, expanded_videos=ANY)
"""Qwen repeats images row by row since ever, and those of Idefics have a batch axis."""
TILED = Stock(expanded_images=ANY if NEWEST else 0, expanded_videos=ANY if NEWEST else 0)
"""5.17 repeats tile by tile, or patch by patch."""
PREFIX = Stock(second_turn=False, second_turn_image=False, chunked_prefill=False)
GLM = Stock(
    chunked_video=False,  # looks for video_token_id, which GLM does not use
    expanded_images=1 if NEWEST else ANY,  # 5.23 repeats image by image: (a, a, b, b) for the row (a, b)
    expanded_videos=0 if NEWEST else ANY,  # 5.23 raises
)
