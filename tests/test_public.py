# SPDX-License-Identifier: Apache-2.0
"""The public surface: its names, what their signatures show, and how fast they come."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import plphp
import plphp.evaluation
import plphp.extend
import plphp.kernels

SURFACE = {
    "plphp": (
        *("AttentionProfile", "Branches", "PLPHPConfig", "PruneReport", "PrunedCache", "QueryBank"),
        *("RetentionMeasurement", "Session", "apply", "available_families", "available_methods", "branch", "calibrate"),
        *(
            "collect_query_bank",
            "measure_retention",
            "profile",
            "prune",
            "register_family",
            "register_method",
            "remove",
        ),
        *("BackendUnavailableError", "CacheMemoryError", "CacheStateError", "ConfigError", "HistoryError", "LoadError"),
        *("NonFiniteAttentionError", "PLPHPError", "SpanError", "UnprunedWarning", "UnsupportedFeatureError"),
        "UnsupportedModelError",
    ),
    "plphp.extend": (
        *(
            "AttentionStage",
            "EncoderStage",
            "KVStage",
            "Method",
            "Mix",
            "Option",
            "OwnBank",
            "PLPHPConfig",
            "PrefillStage",
            "register_method",
        ),
        *(
            "Allocation",
            "Allocator",
            "Evidence",
            "LayerClass",
            "LayerScores",
            "LayerStates",
            "Layers",
            "RowAllocation",
            "ScoredLayer",
            "settings",
        ),
        *("by_vision_attention", "keep_all", "kept_count", "proportional", "uniform", "with_rates"),
        *("at_random", "by_best_position", "by_peak", "by_value_norm", "combined", "per_head", "pooled"),
        *("ConfigError", "Ranker", "SpanError", "keep_mask", "shared_by_heads", "times_value_norm"),
        *("Chosen", "ImageTokens", "TowerEvidence"),
        *("Family", "Features", "Inputs", "VisionSegment", "VisionTower", "register_family"),
    ),
    "plphp.kernels": ("WindowScores", "compact_kv", "decode_attention", "merge_states", "window_scores"),
}
"""By module its public names: a name that comes or goes is a decision, and this is where it is taken."""
OWN = re.compile(r"\b_?[A-Z]\w+")
STANDARD = {
    *(
        "AbstractContextManager",
        "Any",
        "Callable",
        "Iterable",
        "Iterator",
        "Literal",
        "Mapping",
        "Path",
        "Sequence",
        "TypeAlias",
    ),
    *("PreTrainedModel", "PretrainedConfig", "Tensor", "None", "True", "False"),
}
"""Names in signatures that are those of Python, torch and transformers."""
CALLED_BY_ENGINES = {
    *("attachment", "listening", "run_generate", "answer", "chain", "reading", "stages", "acting", "note"),
    *("enter_layer", "leave_layers", "packed_mask", "forget_leaving", "before_attention"),
    *("after_attention", "leave_whole", "note_unpruned", "plan_generate", "warn_unpruned"),
}
"""Methods of public classes that other parts of plphp call, and nobody else."""
SHOWN_WITH_IT = {
    *("BankProgress", "EntrySample", "Kind", "LayerBank", "LayerBooks", "PackedKV", "ProfiledPrompt", "PromptReport"),
    *("CodedKV", "Ladder", "LayerBytes", "QueryRows", "ReAttention", "Rotation", "RungBytes", "StandIn", "TierReport"),
    *("ImageMemory", "PromptCodes", "Value"),
}
"""What public objects are made of: documented where they are reached from."""


@pytest.mark.parametrize("module", SURFACE)
def test_the_public_names_are_these(module: str) -> None:
    assert sorted(importlib.import_module(module).__all__) == sorted(SURFACE[module])


def public() -> list[tuple[str, Any]]:
    return [
        (f"{module}.{name}", getattr(importlib.import_module(module), name))
        for module, names in SURFACE.items()
        for name in names
    ]


def annotations(item: Any) -> dict[str, str]:
    """The annotations of a function, or of the fields and public methods of a class, as text."""
    if not inspect.isclass(item):
        return {name: str(value) for name, value in getattr(item, "__annotations__", {}).items()}
    fields = dataclasses.fields(item) if dataclasses.is_dataclass(item) else ()
    shown = {field.name: str(field.type) for field in fields if not field.name.startswith("_")}
    for name, member in vars(item).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and name not in CALLED_BY_ENGINES:
            notes = getattr(function, "__annotations__", {})
            shown |= {f"{name}.{parameter}": str(value) for parameter, value in notes.items()}
    return shown


def test_no_public_object_shows_internals() -> None:
    """The signatures of functions and the fields of dataclasses name public types alone."""
    known = {name.rpartition(".")[2] for name, _ in public()} | STANDARD | SHOWN_WITH_IT
    shown = {
        f"{name}({part}: {annotation})"
        for name, item in public()
        for part, annotation in annotations(item).items()
        if set(OWN.findall(re.sub(r"\"[^\"]*\"|'[^']*'", "", annotation))) - known
    }
    assert sorted(shown) == []


def test_the_reference_leaves_out_what_engines_call() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "zensical.toml").read_text(encoding="utf-8"))
    options = settings["project"]["plugins"]["mkdocstrings"]["handlers"]["python"]["options"]
    private, *hidden = (pattern.removeprefix("!") for pattern in options["filters"])
    assert private == "^_"
    assert {name for pattern in hidden for name in re.sub(r"[\^()$]", "", pattern).split("|")} == CALLED_BY_ENGINES


def test_every_public_object_says_what_it_is() -> None:
    items = [(name, item) for name, item in public() if isinstance(item, type | FunctionType)]
    # A dataclass without a docstring is given one by Python: its signature.
    undocumented = [name for name, item in items if not item.__doc__ or item.__doc__.startswith(f"{item.__name__}(")]
    assert undocumented == []


def test_every_public_name_comes_on_first_use() -> None:
    assert sorted(plphp.__all__) == sorted(plphp._MODULE_OF)
    assert all(name in dir(plphp) for name in plphp.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pruned'"):
        _ = plphp.pruned


@pytest.mark.parametrize("module", ["plphp.cli", "plphp.extend"])
def test_what_is_looked_at_before_a_model_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
