# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: each rank has some of a layer's heads; all evict as much, so that they share their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from plphp.errors import UnsupportedFeatureError
from plphp.policy.evidence import EVIDENCE, LayerScores


@dataclass(frozen=True)
class Ranks:
    """The workers that share the heads of every layer, seen from one of them.

    Parameters
    ----------
    count : int
        How many there are.
    own : int
        Number of this one; it has the heads between those of the ones before it and of the ones behind it.
    gather : callable, optional
        Join a tensor [batch, heads, ...] of each into one with all heads; None where there is one alone.
    """

    count: int = 1
    own: int = 0
    gather: Callable[[Tensor], Tensor] | None = None

    def whole(self, scores: LayerScores) -> LayerScores:
        """Scores of all heads of a layer, the same on every rank, from those of the heads of this one."""
        if self.gather is None:
            return scores
        joined: dict[str, Any] = {
            field.name: self.gather(value.contiguous())
            for field in fields(scores)
            if field.name in EVIDENCE and (value := getattr(scores, field.name)) is not None
        }
        return replace(scores, kv_heads=scores.kv_heads * self.count, **joined)

    def part(self, states: Tensor) -> Tensor:
        """Of [batch, kv_heads, ...] of all heads those of this rank."""
        return states.chunk(self.count, dim=1)[self.own]


def ranks_of(vllm_config: Any) -> Ranks:
    """The ranks of the worker that this process is.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of its engine.
    """
    count = vllm_config.parallel_config.tensor_parallel_size
    if count == 1:
        return Ranks()
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return Ranks(count, group.rank_in_group, lambda states: group.all_gather(states, dim=1))


def refuse_ranks(count: int, kv_heads: int, bank: bool) -> None:
    """Raise `UnsupportedFeatureError` where the heads of a layer cannot be shared out among ranks.

    Parameters
    ----------
    count : int
        Tensor parallel size.
    kv_heads : int
        KV heads of a layer, of all ranks together.
    bank : bool
        Whether the method ranks by a query bank, which holds the queries of all heads.
    """
    if kv_heads % count:
        raise UnsupportedFeatureError(
            f"plphp does not work with tensor parallelism of {count} and {kv_heads} KV heads: use a size that divides "
            "the KV heads, so that no two ranks have the same."
        )
    if bank and count > 1:
        raise UnsupportedFeatureError(
            "plphp does not work with tensor parallelism and a query bank: use --tensor-parallel-size 1 or another "
            "method."
        )
