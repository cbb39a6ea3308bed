# SPDX-License-Identifier: Apache-2.0
"""What ``--model_args`` says: settings of pruning, and the sizes of batches and videos."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plphp.errors import ConfigError, did_you_mean
from plphp.methods.registry import chain_of
from plphp.settings.config import PLPHPConfig
from plphp.settings.presets import default_settings

QUOTES = "'\""


def read_settings(config: object, config_file: object, *, bundled: bool) -> PLPHPConfig:
    """Make the settings of pruning from the arguments ``config`` and ``config_file``.

    lmms-eval cuts ``--model_args`` at every comma outside quotes, and leaves the quotes where they are. So settings
    with commas stand in single quotes, which are taken off here; double quotes belong to the grammar of settings.

    Parameters
    ----------
    config : object
        A line as `PLPHPConfig.parse` reads it, in quotes or without; None where it is left out.
    config_file : object
        A preset file, likewise.
    bundled : bool
        Whether the settings are for the bundled model, which has defaults of its own.

    Returns
    -------
    PLPHPConfig
        The defaults of ``plphp generate`` where neither is given.

    Raises
    ------
    ConfigError
        If both are given, a method or a setting is unknown, or the method would first collect a query bank.
    """
    if config is not None and config_file is not None:
        raise ConfigError("config and config_file contradict each other: give all settings in one of them.")
    if config is not None:
        settings = PLPHPConfig.parse(unquoted(str(config)))
    elif config_file is not None:
        settings = PLPHPConfig.from_toml(Path(unquoted(str(config_file))))
    else:
        settings = default_settings(bundled)
    if chain_of(settings).own_bank is not None:  # also refuses unknown methods and options
        raise ConfigError(
            f"The method {settings.method!r} without a bank would answer the first documents of the benchmark "
            "unpruned, to collect one, and they would be scored like all others: collect a bank with `plphp collect` "
            "and name it, as in config='query_bank:bank=bank.safetensors,retention_rate=0.2'."
        )
    return settings


def unquoted(text: str) -> str:
    """The text without the pair of quotes around it, if there is one."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES else text


def read_count(name: str, value: object) -> int:
    """Read an argument that counts something.

    Raises
    ------
    ConfigError
        If it is no integer of at least 1.
    """
    try:
        count = int(str(value))
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}.")
    return count


def check_known(unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for arguments that plphp has no use for, such as the rest of settings that were cut."""
    for name in unknown:
        raise ConfigError(
            f"The model plphp takes no argument {name!r}.{did_you_mean(name, known)} Settings with commas stand in "
            "single quotes, as in --model_args \"config='query_bank:bank=bundled,retention_rate=0.2'\"."
        )
