# SPDX-License-Identifier: Apache-2.0
"""Thresholds that were calibrated on another model."""

from __future__ import annotations

import functools
import logging

from .config import PLPHPConfig

_logger = logging.getLogger("plphp")


@functools.lru_cache
def warn_if_calibrated_elsewhere(config: PLPHPConfig, layers: int) -> None:
    """Log a warning, once, where thresholds meet a model of another depth than that they were calibrated on.

    Parameters
    ----------
    config : PLPHPConfig
        The settings.
    layers : int
        Decoder layers of the model.
    """
    if config.calibrated_layers not in (None, layers):
        _logger.warning(
            "The thresholds were calibrated on a model with %d decoder layers and are used on one with %d: calibrate "
            "again with this model.",
            config.calibrated_layers,
            layers,
        )
