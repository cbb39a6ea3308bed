# SPDX-License-Identifier: Apache-2.0
"""Make a config of the options on pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plphp.errors import ConfigError
from plphp.io.hub import is_hub_id
from plphp.methods.registry import chain_of, get_method
from plphp.settings.checks import check_kept_once
from plphp.settings.config import PLPHPConfig
from plphp.settings.presets import with_defaults


def read_settings(
    config: str | None,
    config_file: Path | None,
    method: str | None,
    retention_rate: float | None,
    target_retention: float | None,
    *,
    bundled: bool = False,
    evicts: bool = False,
) -> PLPHPConfig:
    """Make the config of the options that set it.

    Parameters
    ----------
    config, config_file, method, retention_rate, target_retention
        Values of the options, None for those left out.
    bundled : bool
        Whether the config is for the bundled model, which has a default method of its own.
    evicts : bool
        Whether tokens are evicted without any option: where nothing can be held in few bits, or thresholds are
        asked for.

    Returns
    -------
    PLPHPConfig
        A config whose method exists and takes its options.

    Raises
    ------
    ConfigError
        If the options contradict each other, or name a method or a setting that does not exist.
    """
    single = {"method": method, "retention_rate": retention_rate, "target_retention": target_retention}
    explicit: dict[str, Any] = {name: value for name, value in single.items() if value is not None}
    sources = [name for name, value in (("--config", config), ("--config-file", config_file)) if value is not None]
    sources += [f"--{name.replace('_', '-')}" for name in explicit]
    if (config is not None or config_file is not None) and len(sources) > 1:
        raise ConfigError(f"{' and '.join(sources)} contradict each other: give all settings in one of them.")
    if retention_rate is not None and target_retention is not None:
        raise ConfigError("--retention-rate and --target-retention contradict each other: give one of them.")
    if config is not None:
        settings = PLPHPConfig.parse(config)
    elif config_file is not None:
        settings = _of_file(config_file)
    elif method is not None and get_method(method).tiers is not None:  # its ladder says how much is kept
        check_kept_once(f"The ladder of the method {method!r}", explicit)
        settings = PLPHPConfig.from_dict(explicit)
    else:
        settings = PLPHPConfig.from_dict(with_defaults(explicit, bundled, evicts))
    chain_of(settings)  # refuses unknown methods and options now, before anything is loaded
    return settings


def _of_file(path: Path) -> PLPHPConfig:
    """The settings of a TOML file, or of a folder or a repository in the hub's layout."""
    if path.is_dir() or is_hub_id(str(path)):
        return PLPHPConfig.from_pretrained(path)
    return PLPHPConfig.from_toml(path)
