# SPDX-License-Identifier: Apache-2.0
"""Presets: settings where none are given, and settings with a record of how they were found, as a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from .config import PLPHPConfig

DEFAULT_TARGET = 0.4
"""Target retention where no rate is given: thresholds that fit any model and prompt are not to be had."""
BUNDLED_METHOD = "query_bank"
"""Method for the bundled model where none is given: of its answers it keeps most (docs/quality.md)."""
BUNDLED_OPTIONS = {"query_bank": {"bank": "bundled"}}
"""Options of methods that need something of the model, and have it of the bundled one."""
HEADER = "# Made by `plphp calibrate`. Use it with `plphp generate --config-file` or PLPHPConfig.from_toml.\n\n"


def default_settings(bundled: bool) -> PLPHPConfig:
    """Settings of ``plphp generate`` where none are given: 40 % of the vision tokens kept.

    Parameters
    ----------
    bundled : bool
        Whether they are for the bundled model, which is pruned by its query bank; all other models are pruned by the
        paper's method.
    """
    return PLPHPConfig.from_dict(with_defaults({}, bundled))


def with_defaults(given: Mapping[str, Any], bundled: bool) -> dict[str, Any]:
    """Add to single settings those that are taken where they are left out.

    Parameters
    ----------
    given : mapping
        Of ``method``, ``retention_rate`` and ``target_retention`` those that are set.
    bundled : bool
        Whether they are for the bundled model.

    Returns
    -------
    dict
        For `PLPHPConfig.from_dict`.
    """
    values = dict(given) if "retention_rate" in given else {"target_retention": DEFAULT_TARGET, **given}
    if not bundled:
        return values
    values = {"method": BUNDLED_METHOD, **values}
    return {**values, "options": BUNDLED_OPTIONS.get(values["method"], {})}


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
