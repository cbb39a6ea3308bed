# SPDX-License-Identifier: Apache-2.0
"""The bytes that images take."""

from __future__ import annotations

from typing import NamedTuple


class ImageBytes(NamedTuple):
    """Bytes that a cache takes for its images.

    Parameters
    ----------
    held : int
        What it holds of them; 0 without a budget, where it does not know.
    budget : int
        What it may hold; 0 without a budget, and before anything was read.
    host : int
        Whole images in host memory.
    """

    held: int = 0
    budget: int = 0
    host: int = 0
