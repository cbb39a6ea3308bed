# SPDX-License-Identifier: Apache-2.0
"""Files of a run that is not finished: written whole or not at all, and gone on with by the same seed only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(path: Path, **state: Any) -> None:
    """Write tensors and numbers so that a reader never sees half of them."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load(path: Path, seed: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save`` wrote.

    Raises
    ------
    ValueError
        If it is of a run of another seed.
    """
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    if state["seed"] != seed:
        raise ValueError(f"{path} is of a run with seed {state['seed']}, got {seed}: give that seed or another folder.")
    return state
