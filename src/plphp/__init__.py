# SPDX-License-Identifier: Apache-2.0
"""Evict vision tokens from the KV cache of vision-language models, per layer and per head.

>>> import plphp
>>> with plphp.prune(model, plphp.PLPHPConfig(retention_rate=0.4)) as run:  # doctest: +SKIP
...     output = model.generate(**inputs)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .branching import Branches, branch
    from .cache import PrunedCache
    from .calibration import RetentionMeasurement, calibrate, measure_retention
    from .collecting import collect_query_bank
    from .config import PLPHPConfig
    from .errors import (
        BackendUnavailableError,
        CacheMemoryError,
        CacheStateError,
        ConfigError,
        HistoryError,
        LoadError,
        NonFiniteAttentionError,
        PLPHPError,
        SpanError,
        UnprunedWarning,
        UnsupportedFeatureError,
        UnsupportedModelError,
    )
    from .profile_report import AttentionProfile
    from .profiling import profile
    from .query_bank import QueryBank
    from .registry import available_families, available_methods, register_family, register_method
    from .report import PruneReport
    from .session import Session, apply, prune, remove

__version__ = "0.1.0"

_MODULES = {
    "branching": ("Branches", "branch"),
    "cache": ("PrunedCache",),
    "calibration": ("RetentionMeasurement", "calibrate", "measure_retention"),
    "collecting": ("collect_query_bank",),
    "config": ("PLPHPConfig",),
    "errors": (
        "BackendUnavailableError",
        "CacheMemoryError",
        "CacheStateError",
        "ConfigError",
        "HistoryError",
        "LoadError",
        "NonFiniteAttentionError",
        "PLPHPError",
        "SpanError",
        "UnprunedWarning",
        "UnsupportedFeatureError",
        "UnsupportedModelError",
    ),
    "profile_report": ("AttentionProfile",),
    "profiling": ("profile",),
    "query_bank": ("QueryBank",),
    "registry": ("available_families", "available_methods", "register_family", "register_method"),
    "report": ("PruneReport",),
    "session": ("Session", "apply", "prune", "remove"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AttentionProfile",
    "BackendUnavailableError",
    "Branches",
    "CacheMemoryError",
    "CacheStateError",
    "ConfigError",
    "HistoryError",
    "LoadError",
    "NonFiniteAttentionError",
    "PLPHPConfig",
    "PLPHPError",
    "PruneReport",
    "PrunedCache",
    "QueryBank",
    "RetentionMeasurement",
    "Session",
    "SpanError",
    "UnprunedWarning",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "apply",
    "available_families",
    "available_methods",
    "branch",
    "calibrate",
    "collect_query_bank",
    "measure_retention",
    "profile",
    "prune",
    "register_family",
    "register_method",
    "remove",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch and transformers take seconds, which `plphp --help` need not.
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
