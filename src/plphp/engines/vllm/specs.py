# SPDX-License-Identifier: Apache-2.0
"""The KV cache of one layer as a group of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

_number = itertools.count()


@dataclass(frozen=True, kw_only=True)
class PrunedLayerSpec(FullAttentionSpec):
    """Full attention whose blocks are shared with no other layer.

    vLLM puts layers whose specs can be merged into one group with one block table. These never can, as each has a
    number of its own; all of them still have pages of one size, so that they draw from one pool.
    """

    number: int

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> PrunedLayerSpec:
        """Make the spec of a further layer from that which vLLM made."""
        values = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}
        return cls(**values, number=next(_number))

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> Any:
        """Return the spec of one layer; vLLM takes an `AssertionError` as a sign that specs do not go together."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("Layers that are pruned have a KV cache group each.")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, Any]) -> bool:
        """Whether all layers may share one group: only if there is one."""
        return len(kv_cache_specs) == 1
