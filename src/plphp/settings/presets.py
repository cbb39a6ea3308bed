# SPDX-License-Identifier: Apache-2.0
"""Presets: the default settings, and settings with a record of their calibration, as a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import DEFAULT, PLPHPConfig
from .toml_text import toml_text

DEFAULT_TARGET = 0.4
"""Default target retention. A target and not a rate, as no thresholds fit every model and prompt."""
BUNDLED_METHOD, BUNDLED_TIERS = "query_bank", "t10"
"""Default method of the bundled model, which has a bank with codebooks, and its ladder (docs/quality.md)."""
BUNDLED_OPTIONS = {"query_bank": {"bank": "bundled"}}
"""Options of methods that need something measured on the model, which ships with the bundled model."""
COMPARED_RETENTION = (0.5, 0.25, 0.1)
HEADER = "# Made by `plphp calibrate`. Use it with `plphp generate --config-file` or PLPHPConfig.from_toml.\n\n"


def default_settings(bundled: bool) -> PLPHPConfig:
    """Return the settings of ``plphp generate`` without options.

    Parameters
    ----------
    bundled : bool
        Whether the settings are for the bundled model, whose query bank decides what is held in how many bits; of every
        model besides all vision entries are held in 3 bits.
    """
    return PLPHPConfig.from_dict(with_defaults({}, bundled))


def compared(bundled: bool) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return what ``plphp report`` compares with the full cache where nothing is named: lines of methods, retentions.

    Parameters
    ----------
    bundled : bool
        Whether it is for the bundled model.
    """
    if bundled:
        own = f"{BUNDLED_METHOD}:bank=bundled"
        lines = (f"{BUNDLED_TIERS}={own},tiers={BUNDLED_TIERS}", f"{BUNDLED_METHOD}={own}", "plphp", "snapkv")
    else:
        lines = (f"{DEFAULT['tiers']}={DEFAULT['method']}:tiers={DEFAULT['tiers']}", "plphp", "snapkv", "random")
    return lines, COMPARED_RETENTION


def with_defaults(explicit: Mapping[str, Any], bundled: bool, evicts: bool = False) -> dict[str, Any]:
    """Add defaults to the settings that a user has set; with any of them vision tokens are evicted.

    Parameters
    ----------
    explicit : mapping
        Those of ``method``, ``retention_rate`` and ``target_retention`` that are set.
    bundled : bool
        Whether the settings are for the bundled model.
    evicts : bool
        Whether vision tokens are evicted where nothing is set, too.

    Returns
    -------
    dict
        Values for `PLPHPConfig.from_dict`.
    """
    if not explicit and not evicts:
        own = {"method": BUNDLED_METHOD, "tiers": BUNDLED_TIERS, "options": BUNDLED_OPTIONS[BUNDLED_METHOD]}
        return own if bundled else dict(DEFAULT)
    values = dict(explicit) if "retention_rate" in explicit else {"target_retention": DEFAULT_TARGET, **explicit}
    if not bundled:
        return values
    values = {"method": BUNDLED_METHOD, **values}
    return {**values, "options": BUNDLED_OPTIONS.get(values["method"], {})}


def preset_text(config: PLPHPConfig, calibration: Mapping[str, Any]) -> str:
    """Write settings and the record of their calibration as TOML.

    Parameters
    ----------
    config : PLPHPConfig
        Settings, for the table ``[plphp]``.
    calibration : mapping
        The record, for the table ``[calibration]``; nested mappings are tables under it. Nothing but people reads it:
        what pruning needs to know of the calibration, such as ``calibrated_layers``, is among the settings.

    Returns
    -------
    str
        TOML without the values that are None, which TOML cannot write.
    """
    return toml_text(HEADER, {"plphp": config.to_dict(), "calibration": calibration})


def write_preset(path: str | Path, config: PLPHPConfig, calibration: Mapping[str, Any]) -> None:
    """Write settings and the record of their calibration to a TOML file, see `preset_text`."""
    Path(path).write_text(preset_text(config, calibration), encoding="utf-8")
