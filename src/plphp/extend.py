# SPDX-License-Identifier: Apache-2.0
"""All that a package of methods or model families imports; docs/extending.md has a worked example of both.

Nothing here imports torch: an installed package is looked at to list its methods and to check settings, before any
model is loaded. A method's own file imports torch in the functions that compute.
"""

from plphp.errors import ConfigError, SpanError
from plphp.families.base import Family, Features, Inputs, VisionSegment
from plphp.families.registry import register_family
from plphp.families.towers import VisionTower
from plphp.methods.registry import register_method
from plphp.policy.allocation import (
    Allocation,
    Allocator,
    LayerClass,
    Layers,
    RowAllocation,
    ScoredLayer,
    by_vision_attention,
    keep_all,
    kept_count,
    proportional,
    uniform,
    with_rates,
)
from plphp.policy.evidence import Evidence, LayerScores, OwnBank
from plphp.policy.image_tokens import Chosen, ImageTokens, TowerEvidence
from plphp.policy.method import Method
from plphp.policy.rankers import (
    Ranker,
    at_random,
    by_best_position,
    by_peak,
    by_value_norm,
    combined,
    per_head,
    pooled,
    shared_by_heads,
    times_value_norm,
)
from plphp.policy.selection import Mix, keep_mask
from plphp.policy.stages import AttentionStage, EncoderStage, KVStage, PrefillStage
from plphp.policy.states import LayerStates
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

__all__ = [
    "Allocation",
    "Allocator",
    "AttentionStage",
    "Chosen",
    "ConfigError",
    "EncoderStage",
    "Evidence",
    "Family",
    "Features",
    "ImageTokens",
    "Inputs",
    "KVStage",
    "LayerClass",
    "LayerScores",
    "LayerStates",
    "Layers",
    "Method",
    "Mix",
    "Option",
    "OwnBank",
    "PLPHPConfig",
    "PrefillStage",
    "Ranker",
    "RowAllocation",
    "ScoredLayer",
    "SpanError",
    "TowerEvidence",
    "VisionSegment",
    "VisionTower",
    "at_random",
    "by_best_position",
    "by_peak",
    "by_value_norm",
    "by_vision_attention",
    "combined",
    "keep_all",
    "keep_mask",
    "kept_count",
    "per_head",
    "pooled",
    "proportional",
    "register_family",
    "register_method",
    "settings",
    "shared_by_heads",
    "times_value_norm",
    "uniform",
    "with_rates",
]
