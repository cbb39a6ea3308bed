# SPDX-License-Identifier: Apache-2.0
"""The plugin's settings, from vLLM's ``--additional-config`` or from the environment."""

from __future__ import annotations

import json
import os
from typing import Any

from plphp.errors import ConfigError
from plphp.io.quoting import one_line
from plphp.settings.config import PLPHPConfig

KEY = "plphp"
ENVIRONMENT = "PLPHP_VLLM_CONFIG"


def settings_of(vllm_config: Any) -> PLPHPConfig | None:
    """The settings that an engine was started with.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Its ``additional_config`` may hold a table ``plphp``. Else the environment variable ``PLPHP_VLLM_CONFIG`` may
        hold the table as JSON.

    Returns
    -------
    PLPHPConfig or None
        None where the plugin is not configured.

    Raises
    ------
    ConfigError
        If the settings are given in both places, cannot be read, or are not valid.
    """
    additional = getattr(vllm_config, "additional_config", None)
    table = additional.get(KEY) if isinstance(additional, dict) else None
    text = os.environ.get(ENVIRONMENT)
    if text is not None and table is not None:
        raise ConfigError(f"plphp is configured by --additional-config and by {ENVIRONMENT}: leave one of them out.")
    source = f'the key "{KEY}" of --additional-config'
    if text is not None:
        source = ENVIRONMENT
        try:
            table = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{ENVIRONMENT} must hold a JSON object, got {text!r}: {one_line(error)}.") from error
    if table is None:
        return None
    if not isinstance(table, dict):
        raise ConfigError(f"{source} must be a table of settings, got {table!r}.")
    return PLPHPConfig.from_dict(table)
