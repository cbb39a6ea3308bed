# SPDX-License-Identifier: Apache-2.0
"""Checks of files, names and numbers that need no torch, whose import takes seconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError, LoadError
from plphp.inputs.sources import check_device_name, check_dtype, reachable_source


def check_in_file(path: Path | None, what: str) -> None:
    """Raise LoadError if there is no file at a path that was named."""
    if path is not None and path.is_dir():
        raise LoadError(f"Cannot read the {what} {path}: it is a folder.")
    if path is not None and not path.exists():
        raise LoadError(f"Cannot read the {what} {path}: there is no such file.")


def check_out_file(path: Path | None, what: str) -> None:
    """Raise ConfigError, before the work is done, if a file cannot be written to a path."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent} to write the {what} to.")
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is a folder: name the file to write the {what} to.")


def check_out_folder(path: Path) -> None:
    """Raise ConfigError if there is a file where a folder is to be."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file: name a folder.")


def check_text(text: str | None, name: str) -> None:
    """Raise ConfigError for a prompt or a question with nothing in it."""
    if text is not None and not text.strip():
        raise ConfigError(f"{name} is empty: write what is asked about the image.")


def check_model(model: str | None, dtype: str = "auto", device: str | None = None) -> None:
    """Raise PLPHPError if there is no such dtype, device or model."""
    check_dtype(dtype)
    check_device_name(device)
    reachable_source(model)


def sampling_options(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Return the arguments of ``generate`` for sampling, or for greedy search without temperature and top-p.

    Raises
    ------
    ConfigError
        If a number is out of range, or there is a seed where nothing is drawn.
    """
    if temperature is None and top_p is None:
        if seed is not None:
            raise ConfigError("--seed is for sampling: give --temperature or --top-p with it.")
        return {"do_sample": False}
    if temperature is not None and not 0 < temperature < math.inf:
        raise ConfigError(f"--temperature must be above 0, got {temperature}: leave it out for greedy search.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be in (0, 1], got {top_p}.")
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": 1.0 if top_p is None else top_p}
