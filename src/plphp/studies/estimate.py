# SPDX-License-Identifier: Apache-2.0
"""Admission arithmetic: KV bytes, largest batch and the least time of a decoding step, before and after pruning.

A decoding step reads the weights once and the kept keys and values once, so it takes at least their bytes over the
bandwidth of the memory. Nothing here is measured; ``benchmarks/decode.py`` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from plphp.errors import ConfigError

from .accelerators import Accelerator
from .model_cost import ModelCost

RESERVE = 0.1
"""Part of the memory that is left to activations, the workspace of kernels and fragmentation."""


@dataclass(frozen=True)
class Workload:
    """Sequences that are decoded together, all alike.

    Parameters
    ----------
    vision_tokens, text_tokens : int
        Tokens of each prompt.
    new_tokens : int
        Tokens of each answer.
    batch : int
        Number of sequences.
    """

    vision_tokens: int
    text_tokens: int
    new_tokens: int = 256
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("vision_tokens", 0), ("text_tokens", 0), ("new_tokens", 1), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")

    @property
    def tokens(self) -> int:
        """Tokens of a sequence at the end of its answer."""
        return self.vision_tokens + self.text_tokens + self.new_tokens


@dataclass(frozen=True)
class Estimate:
    """What decoding at a retention takes at the last token of the answers, where it takes most.

    Parameters
    ----------
    retention : float
        Fraction of the vision tokens that every layer and KV head keeps.
    sequence_kv_bytes, kv_bytes : int
        Bytes of the KV cache of a sequence, and of the batch.
    memory_bytes : int
        Bytes of the weights and of the KV cache of the batch.
    step_bytes : int
        Bytes that a decoding step reads.
    fits : bool, optional
        Whether the batch fits into the memory, less the reserve. None, as all that follows, without an accelerator.
    largest_batch : int, optional
        Sequences that fit.
    step_seconds : float, optional
        Least time of a decoding step of the batch.
    tokens_per_second : float, optional
        Most tokens per second that the batch can generate.
    most_tokens_per_second : float, optional
        Most tokens per second that the largest batch can generate; 0 where not even a single sequence fits.
    """

    retention: float
    sequence_kv_bytes: int
    kv_bytes: int
    memory_bytes: int
    step_bytes: int
    fits: bool | None = None
    largest_batch: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    most_tokens_per_second: float | None = None


def estimate(
    cost: ModelCost,
    workload: Workload,
    retention: float = 1.0,
    accelerator: Accelerator | None = None,
    reserve: float = RESERVE,
) -> Estimate:
    """Work out what decoding takes.

    Prompts are taken to be read in turn: a prompt that is being read holds the full keys and values of a layer beside
    what is kept, and its activations; both have to fit into the reserve.

    Parameters
    ----------
    cost : ModelCost
        What the model takes, see `plphp.studies.model_cost.model_cost`.
    workload : Workload
        The sequences that are decoded.
    retention : float
        Fraction of the vision tokens to keep, in [0, 1]. 1 is what transformers holds without plphp.
    accelerator : Accelerator, optional
        Where they are decoded, see `plphp.studies.accelerators.accelerator`.
    reserve : float
        Part of the memory, in [0, 1), that neither weights nor keys and values take.

    Returns
    -------
    Estimate

    Raises
    ------
    ConfigError
        If a number is out of range.
    """
    for name, value, top in (("retention", retention, 1.0), ("reserve", reserve, 0.99)):
        if not 0 <= value <= top:
            raise ConfigError(f"{name} must be between 0 and {top:g}, got {value!r}.")
    each = cost.kv_bytes(workload.tokens, workload.vision_tokens, retention)
    batch = workload.batch
    bytes_alone = Estimate(
        retention=retention,
        sequence_kv_bytes=each,
        kv_bytes=batch * each,
        memory_bytes=cost.weight_bytes + batch * each,
        step_bytes=cost.step_weight_bytes + batch * each,
    )
    if accelerator is None:
        return bytes_alone
    room = (1 - reserve) * accelerator.memory - cost.weight_bytes
    largest = max(0, math.floor(room / each))
    seconds = bytes_alone.step_bytes / accelerator.bandwidth
    at_largest = (cost.step_weight_bytes + largest * each) / accelerator.bandwidth
    return replace(
        bytes_alone,
        fits=batch <= largest,
        largest_batch=largest,
        step_seconds=seconds,
        tokens_per_second=batch / seconds,
        most_tokens_per_second=largest / at_largest,
    )
