# SPDX-License-Identifier: Apache-2.0
"""Evict vision tokens from the KV cache of vision-language models, per layer and per head.

>>> import plphp
>>> with plphp.prune(model, plphp.PLPHPConfig(retention_rate=0.4)) as run:  # doctest: +SKIP
...     output = model.generate(**inputs)
"""

from .cache import PrunedCache
from .calibration import calibrate
from .config import PLPHPConfig
from .errors import (
    BackendUnavailableError,
    CacheStateError,
    ConfigError,
    NonFiniteAttentionError,
    PLPHPError,
    SpanError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from .registry import available_families, available_methods, register_family, register_method
from .report import PruneReport
from .session import Session, apply, prune, remove

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CacheStateError",
    "ConfigError",
    "NonFiniteAttentionError",
    "PLPHPConfig",
    "PLPHPError",
    "PruneReport",
    "PrunedCache",
    "Session",
    "SpanError",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "apply",
    "calibrate",
    "available_families",
    "available_methods",
    "prune",
    "register_family",
    "register_method",
    "remove",
]
