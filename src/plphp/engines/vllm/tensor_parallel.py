# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: each process has some heads of every layer, and the processes have to decide the same.

A token has one slot in all processes, so that they must evict as many entries and free the same blocks; and the layer
level, like some methods, asks the scores of all heads. So scores are gathered before anything is decided, each process
decides for all heads, and keeps of the decision the part of its own heads. Scores are small beside keys and values,
which never travel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from plphp.errors import UnsupportedFeatureError
from plphp.policy.evidence import EVIDENCE, Evidence, LayerScores


@dataclass(frozen=True)
class TensorParallel:
    """The processes that share the heads of every layer, seen from one of them.

    Parameters
    ----------
    size : int
        Number of processes.
    rank : int
        Number of this process; the heads of a layer are shared out in the order of the ranks.
    all_gather : callable, optional
        Join a tensor [batch, heads, ...] of each process into one with all heads; None where there is one process.
    """

    size: int = 1
    rank: int = 0
    all_gather: Callable[[Tensor], Tensor] | None = None

    def all_heads(self, scores: LayerScores) -> LayerScores:
        """Scores of all heads of a layer, the same in every process, from the scores of this process' heads."""
        if self.all_gather is None:
            return scores
        if scores.states is not None:
            raise UnsupportedFeatureError("Keys, values and queries of a layer are not gathered in tensor parallelism.")
        # Only evidence has an axis of heads; masks over tokens are the same in every process.
        joined: dict[str, Any] = {
            field.name: self.all_gather(value.contiguous())
            for field in fields(scores)
            if field.name in EVIDENCE and (value := getattr(scores, field.name)) is not None
        }
        return replace(scores, kv_heads=scores.kv_heads * self.size, **joined)

    def own_heads(self, states: Tensor) -> Tensor:
        """The part of a tensor [batch, kv_heads, ...] over all heads that belongs to this process."""
        return states.chunk(self.size, dim=1)[self.rank]


def tensor_parallel_of(vllm_config: Any) -> TensorParallel:
    """The processes of an engine, seen from the worker that runs here.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        The configuration of the engine.
    """
    size = vllm_config.parallel_config.tensor_parallel_size
    if size == 1:
        return TensorParallel()
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return TensorParallel(size, group.rank_in_group, lambda states: group.all_gather(states, dim=1))


def refuse_shared_heads(size: int, kv_heads: int, bank: bool) -> None:
    """Raise `UnsupportedFeatureError` where the heads of a layer cannot be shared out among processes.

    Parameters
    ----------
    size : int
        Tensor parallel size.
    kv_heads : int
        KV heads of a layer, of all processes together.
    bank : bool
        Whether the method scores by a query bank, which holds the queries of all heads.
    """
    if kv_heads % size:
        raise UnsupportedFeatureError(
            f"plphp does not work with tensor parallelism of {size} and {kv_heads} KV heads: use a size that divides "
            "the KV heads, so that no two ranks have the same."
        )
    if bank and size > 1:
        raise UnsupportedFeatureError(
            "plphp does not work with tensor parallelism and a query bank: use --tensor-parallel-size 1 or another "
            "method."
        )


def refuse_unshared_evidence(size: int, evidence: Evidence, method: str) -> None:
    """Raise `UnsupportedFeatureError` for a method that asks what no process of several has of all heads.

    Parameters
    ----------
    size : int
        Tensor parallel size.
    evidence : Evidence
        What the method asks for.
    method : str
        Its name.
    """
    asked = {
        "the keys, values and queries of all heads": evidence.states is not None,
        # Each process would weigh by its own heads, and score with weights of its own.
        "the attention of all heads between its query rows": evidence.weigh_rows is not None,
    }
    for what, asks in asked.items():
        if asks and size > 1:
            raise UnsupportedFeatureError(
                f"plphp does not work with tensor parallelism and the method {method!r}, which asks for {what}: use "
                "--tensor-parallel-size 1 or another method."
            )
