# SPDX-License-Identifier: Apache-2.0
"""Evict vision tokens from the KV cache of vision-language models, per layer and per head.

Examples
--------
>>> import plphp
>>> with plphp.prune(model, plphp.PLPHPConfig(retention_rate=0.4)) as run:  # doctest: +SKIP
...     output = model.generate(**inputs)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plphp._version import __version__ as __version__

if TYPE_CHECKING:
    from plphp.engines.hf.branching import Branches, branch
    from plphp.engines.hf.cache import PrunedCache
    from plphp.engines.hf.session import Session, apply, prune, remove
    from plphp.errors import (
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
    from plphp.families.registry import available_families, register_family
    from plphp.methods.registry import available_methods, register_method
    from plphp.policy.bank import QueryBank
    from plphp.pruning.report import PruneReport
    from plphp.settings.config import PLPHPConfig
    from plphp.studies.bank_collecting import collect_query_bank
    from plphp.studies.calibration import RetentionMeasurement, calibrate, measure_retention
    from plphp.studies.profile_report import AttentionProfile
    from plphp.studies.profiling import profile

_MODULES = {
    "engines.hf.branching": ("Branches", "branch"),
    "engines.hf.cache": ("PrunedCache",),
    "studies.calibration": ("RetentionMeasurement", "calibrate", "measure_retention"),
    "studies.bank_collecting": ("collect_query_bank",),
    "settings.config": ("PLPHPConfig",),
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
    "studies.profile_report": ("AttentionProfile",),
    "studies.profiling": ("profile",),
    "policy.bank": ("QueryBank",),
    "families.registry": ("available_families", "register_family"),
    "methods.registry": ("available_methods", "register_method"),
    "pruning.report": ("PruneReport",),
    "engines.hf.session": ("Session", "apply", "prune", "remove"),
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
