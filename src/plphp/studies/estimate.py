# SPDX-License-Identifier: Apache-2.0
"""Admission arithmetic: KV bytes, largest batch, least time of a step and of a first token, before and after pruning.

A decoding step reads the weights once and the kept keys and values once, or what it asks for of them, so it takes at
least their bytes over the bandwidth of the memory. A first token takes at least the operations of the prompt's matrix
products over the peak of the accelerator. Nothing here is measured; ``benchmarks/decode.py`` measures.
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
from .schedule import Schedule
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
    """What decoding at a retention takes at the last token of the answers, where it takes most, and a first token.

    Parameters
    ----------
    retention : float
        Fraction of the vision tokens that a layer gets which each of its KV heads keeps, whole or in few bits.
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
    encoder_retention : float
        Share of the vision tokens that comes to the text model.
    prefill : str, optional
        The layers from which on fewer of them are left, with the shares, as `plphp.studies.schedule.Schedule.parse`
        reads them; None where none leave inside prefill.
    attention_retention : float
        Share of the vision tokens that a layer gets among which its attention runs while it reads a prompt.
    computed : int
        Tokens x layers that reading a prompt computes.
    prefill_flops : int
        Operations of the matrix products of the text model for a prompt, at least; a multiplication and an addition
        are two.
    tower_flops : int, optional
        Those of the vision tower and of what follows it, for the images of a prompt; None where they are not known.
    first_token_seconds : float, optional
        Least time from the images and the text of a prompt to the first token: its operations at the accelerator's
        peak, or the bytes of the weights, if they take longer. Without the tower where that is not known. None without
        an accelerator whose peak is known.
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
    encoder_retention: float = 1.0
    prefill: str | None = None
    attention_retention: float = 1.0
    computed: int = 0
    prefill_flops: int = 0
    tower_flops: int | None = None
    first_token_seconds: float | None = None
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
    schedule: Schedule | None = None,
    tower_flops: int | None = None,
) -> Estimate:
    """Work out what decoding takes, and reading a prompt.

    Prompts are taken to be read in turn. Of the one that is being read the full keys and values of a layer, beside what
    is kept, and the activations have to fit into the reserve.

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
        A ladder, by name or as rungs with shares, which all heads of a layer hold as many vision tokens by.
    read : float
        Share of the entries in few bits that a step reads, in (0, 1].
    schedule : Schedule, optional
        What leaves before layers get it, by default nothing, and what attends in them, by default all. What is kept of
        the vision tokens in the end is ``retention``, or the ladder, of those that a layer gets, whatever attends.
    tower_flops : int, optional
        What the images take before the text model, see `plphp.studies.flops.tower_flops`.

    Raises
    ------
    ConfigError
        If a number is out of range, the ladder is none, or the model has no layer of the schedule.
    UnsupportedFeatureError
        If a rung cannot hold the model's keys and values.
    """
    _check_shares(retention, reserve, read)
    schedule = schedule or Schedule()
    there = schedule.vision_tokens(workload.vision_tokens, len(cost.layers))
    bytes_alone = _bytes_alone(cost, workload, retention, tiers, read, there)
    figures = replace(_with_prefill(bytes_alone, cost, workload, schedule, there), tower_flops=tower_flops)
    return figures if accelerator is None else _on_accelerator(figures, cost, workload, accelerator, reserve)


def _on_accelerator(
    figures: Estimate, cost: ModelCost, workload: Workload, accelerator: Accelerator, reserve: float
) -> Estimate:
    """The same with what an accelerator makes of it."""
    room = (1 - reserve) * accelerator.memory - cost.weight_bytes - figures.book_bytes
    largest = max(0, math.floor(room / figures.sequence_kv_bytes))
    seconds = figures.step_bytes / accelerator.bandwidth
    read_of_each = (figures.step_bytes - cost.step_weight_bytes) // workload.batch
    at_largest = (cost.step_weight_bytes + largest * read_of_each) / accelerator.bandwidth
    return replace(
        figures,
        first_token_seconds=_first_token(figures, cost, accelerator),
        fits=workload.batch <= largest,
        largest_batch=largest,
        step_seconds=seconds,
        tokens_per_second=workload.batch / seconds,
        most_tokens_per_second=largest / at_largest,
    )


def _with_prefill(
    figures: Estimate, cost: ModelCost, workload: Workload, schedule: Schedule, there: list[int]
) -> Estimate:
    """The same with what reading a prompt takes, of which layers get ``there`` vision tokens."""
    return replace(
        figures,
        encoder_retention=schedule.encoder,
        prefill=schedule.text,
        attention_retention=schedule.attention,
        computed=len(there) * workload.text_tokens + sum(there),
        prefill_flops=cost.prefill_flops(
            workload.text_tokens, workload.vision_tokens, there, schedule.attending(there)
        ),
    )


def _first_token(figures: Estimate, cost: ModelCost, accelerator: Accelerator) -> float | None:
    """Least time of a first token; None where the accelerator's peak is not known."""
    if accelerator.flops is None:
        return None
    operations = figures.prefill_flops + (figures.tower_flops or 0)
    return max(operations / accelerator.flops, cost.step_weight_bytes / accelerator.bandwidth)


def _check_shares(retention: float, reserve: float, read: float) -> None:
    """Raise `ConfigError` for a number that is out of range."""
    for name, value, top in (("retention", retention, 1.0), ("reserve", reserve, 0.99), ("read", read, 1.0)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= top:
            raise ConfigError(f"{name} must be between 0 and {top:g}, got {value!r}.")


def _bytes_alone(
    cost: ModelCost, workload: Workload, retention: float, tiers: str | None, read: float, there: list[int]
) -> Estimate:
    """The bytes alone."""
    books, batch = 0, workload.batch
    if tiers is None:
        if read != 1:
            raise ConfigError(f"read={read!r} is of entries in few bits, and there are none: give tiers, such as t10.")
        each = of_step = cost.kv_bytes(workload.tokens, workload.vision_tokens, retention, there=there)
    else:
        if retention != 1:
            raise ConfigError(
                f"tiers={tiers} says how much is kept, and so does retention={retention!r}: leave that out."
            )
        if not read:
            raise ConfigError("read must be above 0: a step reads some entries, such as read=0.2.")
        ladder = Ladder.parse(tiers)
        held_in = TierCost(ladder, Reading(read))
        each = cost.kv_bytes(workload.tokens, workload.vision_tokens, tiers=held_in, there=there)
        of_step = cost.read_bytes(workload.tokens, workload.vision_tokens, held_in, there)
        books, retention = cost.book_bytes(held_in), ladder.kept
    return Estimate(
        retention=retention,
        sequence_kv_bytes=each,
        kv_bytes=batch * each,
        memory_bytes=cost.weight_bytes + books + batch * each,
        step_bytes=cost.step_weight_bytes + batch * of_step,
        tiers=tiers,
        read=read,
        book_bytes=books,
    )
