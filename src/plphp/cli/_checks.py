# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with files, names and numbers, looked at before torch is imported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError, LoadError
from plphp.inputs.sources import check_device_name, check_dtype, reachable_source


def check_in_file(path: Path | None, what: str) -> None:
    """Raise LoadError if a file that was named cannot be read from there."""
    if path is not None and path.is_dir():
        raise LoadError(f"Cannot read the {what} {path}: it is a folder.")
    if path is not None and not path.exists():
        raise LoadError(f"Cannot read the {what} {path}: there is no such file.")


def check_out_file(path: Path | None, what: str) -> None:
    """Raise ConfigError, before the work is done, if a file cannot be written there."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"There is no folder {path.parent} to write the {what} to.")
    if path is not None and path.is_dir():
        raise ConfigError(f"{path} is a folder: name the file to write the {what} to.")


def check_out_folder(path: Path) -> None:
    """Raise ConfigError if there is something else than a folder."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file: name a folder.")


def check_text(text: str | None, name: str) -> None:
    """Raise ConfigError for a prompt or a question with nothing in it."""
    if text is not None and not text.strip():
        raise ConfigError(f"{name} is empty: write what is asked about the image.")


def check_model(model: str | None, dtype: str = "auto", device: str | None = None) -> None:
    """Raise PLPHPError for a dtype, device or model that is not to be had."""
    check_dtype(dtype)
    check_device_name(device)
    reachable_source(model)


def sampling_options(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Arguments of ``generate`` for sampling; greedy search if nothing asks for it.

    Raises
    ------
    ConfigError
        If a number is out of range, or a seed is given where nothing is drawn.
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
