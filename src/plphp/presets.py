# SPDX-License-Identifier: Apache-2.0
"""Presets: settings with a record of how they were found, as a TOML file that `PLPHPConfig.from_toml` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from .config import PLPHPConfig

HEADER = "# Made by `plphp calibrate`. Use it with `plphp generate --config-file` or PLPHPConfig.from_toml.\n\n"


def preset_text(config: PLPHPConfig, calibration: Mapping[str, Any]) -> str:
    """Write settings and the record of their calibration as TOML.

    Parameters
    ----------
    config : PLPHPConfig
        Goes to the table ``[plphp]``.
    calibration : mapping
        Goes to the table ``[calibration]``, and nested mappings to tables under it. Nothing reads it but people:
        what settings need to know of it, such as ``calibrated_layers``, is among them.

    Returns
    -------
    str
        TOML; None is left out, as TOML knows no such value.
    """
    tables = {"plphp": config.to_dict(), "calibration": calibration}
    return HEADER + tomli_w.dumps({name: _without_none(table) for name, table in tables.items()})


def write_preset(path: str | Path, config: PLPHPConfig, calibration: Mapping[str, Any]) -> None:
    """Write a preset file, see `preset_text`."""
    Path(path).write_text(preset_text(config, calibration), encoding="utf-8")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    nested = ((key, _without_none(value) if isinstance(value, Mapping) else value) for key, value in values.items())
    return {key: value for key, value in nested if value is not None}
