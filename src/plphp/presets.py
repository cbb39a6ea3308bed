# SPDX-License-Identifier: Apache-2.0
"""Presets: settings with a record of how they were found, as a TOML file that `PLPHPConfig.from_toml` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import PLPHPConfig


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
        TOML; None is left out.
    """
    lines = ["# Made by `plphp calibrate`. Use it with `plphp generate --config-file` or PLPHPConfig.from_toml."]
    return "\n".join([*lines, *_table("plphp", config.to_dict()), *_table("calibration", calibration)]) + "\n"


def write_preset(path: str | Path, config: PLPHPConfig, calibration: Mapping[str, Any]) -> None:
    """Write a preset file, see `preset_text`."""
    Path(path).write_text(preset_text(config, calibration), encoding="utf-8")


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping) and value is not None}
    lines = ["", f"[{name}]", *(f"{_key(key)} = {_value(value)}" for key, value in plain.items())]
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _table(f"{name}.{_key(key)}", value)
    return lines


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _value(key)


def _value(value: Any) -> str:
    """JSON writes text, numbers, booleans and lists of them as TOML does, except for U+007F."""
    return json.dumps(value).replace("\x7f", "\\u007f")
