# SPDX-License-Identifier: Apache-2.0
"""The KV cache of one layer as a group of its own.

vLLM gives blocks back by group: layers that share a block table share every block number, so that a block is free only
when it is empty in all of them, and layers evict different numbers of tokens. Layers whose specs are equal or can be
merged are put into one group. So each spec carries a number that no other spec has, and specs never merge.
"""

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

    Pages still have one size in all layers, so that the groups draw from one pool.

    Parameters
    ----------
    number : int
        Tells this spec from all others; it says nothing of the layer.
    """

    number: int

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> PrunedLayerSpec:
        """Make the spec of a further layer from the spec that vLLM made for it."""
        values = {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}
        return cls(**values, number=next(_number))

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> Any:
        """Return the spec of one layer; vLLM takes an `AssertionError` as a sign that specs do not go together."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("Layers that are pruned have a KV cache group each.")
        return specs[0]

    # vLLM also puts layers of one type and different sizes into one group: that grouping asks here and not `merge`.
    def is_uniform_with_collection(self, kv_cache_specs: Mapping[str, Any]) -> bool:
        """Whether all layers may share one group: only if there is one."""
        return len(kv_cache_specs) == 1
