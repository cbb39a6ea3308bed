# SPDX-License-Identifier: Apache-2.0
"""Admission arithmetic: KV bytes, largest batch and the least time of a decoding step, before and after pruning.

A decoding step reads the weights once and the kept keys and values once, or what it asks for of them, so it takes at
least their bytes over the bandwidth of the memory. Nothing here is measured; ``benchmarks/decode.py`` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from plphp.errors import ConfigError
from plphp.kernels.coded import Reading
from plphp.settings.checks import check_int
from plphp.settings.ladder import Ladder

from .accelerators import Accelerator
from .model_cost import ModelCost
from .tier_cost import TierCost

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
            check_int(name, getattr(self, name), minimum=least)

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
        Fraction of the vision tokens that every layer and KV head keeps, whole or in few bits.
    sequence_kv_bytes, kv_bytes : int
        Bytes of the KV cache of a sequence, and of the batch.
    memory_bytes : int
        Bytes of the weights, of codebooks and of the KV cache of the batch.
    step_bytes : int
        Bytes that a decoding step reads; of codebooks, which caches hold, none.
    tiers : str, optional
        The ladder that holds the vision tokens; None where they are held whole.
    read : float
        Share of the entries in few bits that a step reads.
    book_bytes : int
        Bytes of the codebooks, which all sequences share.
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
    tiers: str | None = None
    read: float = 1.0
    book_bytes: int = 0
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
    *,
    tiers: str | None = None,
    read: float = 1.0,
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
    tiers : str, optional
        A ladder, by name or as rungs with their shares: how the vision tokens are held, and how many of them. The heads
        of a layer are taken to hold as many each.
    read : float
        Share of the entries in few bits that a step reads, in (0, 1].

    Returns
    -------
    Estimate

    Raises
    ------
    ConfigError
        If a number is out of range, or the ladder is none.
    UnsupportedFeatureError
        If a rung cannot hold the model's keys and values.
    """
    _check_shares(retention, reserve, read)
    bytes_alone, each, read_of_each = _bytes_alone(cost, workload, retention, tiers, read)
    if accelerator is None:
        return bytes_alone
    room = (1 - reserve) * accelerator.memory - cost.weight_bytes - bytes_alone.book_bytes
    largest = max(0, math.floor(room / each))
    seconds = bytes_alone.step_bytes / accelerator.bandwidth
    at_largest = (cost.step_weight_bytes + largest * read_of_each) / accelerator.bandwidth
    return replace(
        bytes_alone,
        fits=workload.batch <= largest,
        largest_batch=largest,
        step_seconds=seconds,
        tokens_per_second=workload.batch / seconds,
        most_tokens_per_second=largest / at_largest,
    )


def _check_shares(retention: float, reserve: float, read: float) -> None:
    """Raise `ConfigError` for a number that is out of range."""
    for name, value, top in (("retention", retention, 1.0), ("reserve", reserve, 0.99), ("read", read, 1.0)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= top:
            raise ConfigError(f"{name} must be between 0 and {top:g}, got {value!r}.")


def _bytes_alone(
    cost: ModelCost, workload: Workload, retention: float, tiers: str | None, read: float
) -> tuple[Estimate, int, int]:
    """The bytes, and those that are held and read for a sequence."""
    books, batch = 0, workload.batch
    if tiers is None:
        if read != 1:
            raise ConfigError(f"read={read!r} is of entries in few bits, and there are none: give tiers, such as t10.")
        each = of_step = cost.kv_bytes(workload.tokens, workload.vision_tokens, retention)
    else:
        if retention != 1:
            raise ConfigError(
                f"tiers={tiers} says how much is kept, and so does retention={retention!r}: leave that out."
            )
        if not read:
            raise ConfigError("read must be above 0: a step reads some entries, such as read=0.2.")
        ladder = Ladder.parse(tiers)
        held_in = TierCost(ladder, Reading(read))
        each = cost.kv_bytes(workload.tokens, workload.vision_tokens, tiers=held_in)
        of_step = cost.read_bytes(workload.tokens, workload.vision_tokens, held_in)
        books, retention = cost.book_bytes(held_in), ladder.kept
    figures = Estimate(
        retention=retention,
        sequence_kv_bytes=each,
        kv_bytes=batch * each,
        memory_bytes=cost.weight_bytes + books + batch * each,
        step_bytes=cost.step_weight_bytes + batch * of_step,
        tiers=tiers,
        read=read,
        book_bytes=books,
    )
    return figures, each, of_step
