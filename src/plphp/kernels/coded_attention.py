# SPDX-License-Identifier: Apache-2.0
"""Attention over entries that are held in few bits: all of them, or those that a query wants (recall)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _coded_cpp, choice
from .books import Books, LayerBooks
from .coded import CodedKV, Reading
from .coder import Coder
from .packed import PackedKV
from .precision import as_written
from .rungs import RUNGS

MAX_LOGITS = 2**24
"""Logits that are held at once; long query chunks are cut so that they stay below."""
LOWEST = -1e6
"""What stands in a trial for the log-sum-exp of nothing: -inf less -inf would be no number."""

_counts: ContextVar[list[Tensor] | None] = ContextVar("plphp_read_counts", default=None)


@contextmanager
def counting_reads() -> Iterator[list[Tensor]]:
    """While open, the reference attends, and notes how many entries are read.

    Yields
    ------
    list of Tensor
        For each call of `attend_codes`, float64 [batch, tiers]: entries of each tier that a query of the row reads, in
        sum over the KV heads and in the mean over the queries.
    """
    counts: list[Tensor] = []
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def attend_codes(query: Tensor, coded: CodedKV, scaling: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of queries over coded entries, all of them visible.

    On a CPU a C++ kernel does short queries, which is built when it is first used.

    A query reads what the `Reading` of its row says. Of the entries j of a KV head, the k with the largest index mass

        m[j] = mean over the query heads of softmax_j(q . index[j] * scaling)

    are read, each query for itself, and each query head attends to what its KV head reads. With ``rest`` what is left
    has the logits of its index and, in the place of its values, the mean value of the prompt.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, query, dim].
    coded : CodedKV
        Of ``batch`` rows.
    scaling : float
        Factor on the logits.

    Returns
    -------
    output : Tensor
        [batch, q_heads, query, value_dim], in the dtype of ``query``.
    lse : Tensor
        Log-sum-exp of the logits, float32 or float64 [batch, q_heads, query]; -inf where a row holds nothing.
    """
    if _counts.get() is None and query.shape[2] <= _coded_cpp.LONG and query.device.type == "cpu":
        reason = _coded_cpp.unsupported(query, coded)
        values = query.new_empty(0).expand(_coded_cpp.value_dim(coded))  # of this width, and of no memory
        if choice.usable("attend_codes", "C++", reason, cpp_trial, query, values):
            return _coded_cpp.attend(query, coded, scaling)
    with as_written(query.device):
        return reference(query, coded, scaling)


def reference(query: Tensor, coded: CodedKV, scaling: float) -> tuple[Tensor, Tensor]:
    """As `attend_codes`, in torch: everything is decoded first."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(dtype) * scaling).unflatten(1, (coded.kv_heads, -1))
    tiers = [_side_by_side(tier) for tier in coded.decoded(dtype)]
    keys, values, held = (torch.cat(parts, 2) for parts in zip(*tiers, strict=True))
    index = None
    if coded.recalls:
        found = [_side_by_side(tier)[0] for tier in coded.decoded(dtype, values=False, index=True)]
        index = torch.cat(found, 2)
    batch, _, entries = held.shape
    step = max(1, MAX_LOGITS // max(1, batch * query.shape[1] * entries))
    outputs, lses = [], []
    for part in grouped.split(step, 3):
        logits = _logits(part, keys, held)
        rest = None
        if index is not None:
            of_index = _logits(part, index, held)
            read = _chosen(of_index, coded)
            _note(read, [tier[2].shape[2] for tier in tiers], held)
            logits = logits.masked_fill(~read[:, :, None], -torch.inf)
            rest = _rest(of_index, read, coded)
        else:
            _note(held[:, :, None], [tier[2].shape[2] for tier in tiers], held)
        output, lse = _mixed(logits, values, rest, coded)
        outputs.append(output.flatten(1, 2))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outputs, 2).to(query.dtype), torch.cat(lses, 2)


def _side_by_side(tier: PackedKV) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a block with 0 behind the entries of a head, [batch, kv_heads, longest, dim], and which places
    hold an entry, bool [batch, kv_heads, longest]."""
    starts, counts = tier.index
    longest = max(tier.pair_counts, default=0)
    place = torch.arange(longest, device=tier.device)
    held = place < counts[..., None]
    entries = torch.where(held, starts[..., None] + place, 0)
    if not len(tier.keys):
        blank = pad(tier.keys, (0, 0, 0, 1)), pad(tier.values, (0, 0, 0, 1))
    else:
        blank = tier.keys, tier.values
    keys, values = (torch.where(held[..., None], states[entries], 0) for states in blank)
    return keys, values, held


def _logits(query: Tensor, keys: Tensor, held: Tensor) -> Tensor:
    """Logits [batch, kv_heads, group, query, entries]; -inf where there is no entry."""
    logits = query @ keys[:, :, None].mT
    return logits.masked_fill(~held[:, :, None, None], -torch.inf)


def _chosen(of_index: Tensor, coded: CodedKV) -> Tensor:
    """The entries that queries read, bool [batch, kv_heads, query, entries], from the logits of the index."""
    mass = of_index.softmax(-1).nan_to_num(0.0).mean(2)
    mass = mass.masked_fill(of_index[:, :, 0] == -torch.inf, -1.0)  # never before an entry, whatever its mass
    order = mass.argsort(dim=-1, descending=True, stable=True)
    position = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    wanted = [[coded.reading[row].entries(count) for count in coded.held[row]] for row in coded.rows]
    return position < torch.tensor(wanted, device=order.device)[:, :, None, None]


def _rest(of_index: Tensor, read: Tensor, coded: CodedKV) -> Tensor:
    """Log-sum-exp of the index logits of what is not read, [batch, kv_heads, group, query]; -inf where it is left
    out."""
    stands_in = torch.tensor([coded.reading[row].rest and coded.reading[row].share < 1 for row in coded.rows])
    left = of_index.masked_fill(read[:, :, None], -torch.inf).logsumexp(-1)
    return left.masked_fill(~stands_in.to(left.device)[:, None, None, None], -torch.inf)


def _mixed(logits: Tensor, values: Tensor, rest: Tensor | None, coded: CodedKV) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of logits, with the rest as one more entry."""
    if rest is not None and coded.value_means is not None:
        rows = torch.tensor(coded.rows, device=values.device)
        mean = coded.value_means.to(values.dtype).unflatten(0, (-1, coded.kv_heads))[rows]
        values = torch.cat([values, mean[:, :, None]], 2)
        logits = torch.cat([logits, rest[..., None]], -1)
    lse = logits.logsumexp(-1)
    # Of a row without entries nothing is read: its log-sum-exp says so.
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return weights @ values[:, :, None], lse


def _note(read: Tensor, widths: list[int], held: Tensor) -> None:
    counts = _counts.get()
    if counts is not None:
        of_tiers = (read & held[:, :, None]).double().mean(2).sum(1).split(widths, -1)
        counts.append(torch.stack([tier.sum(-1) for tier in of_tiers], -1))


def cpp_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the C++ kernel and the reference on small cases, in outputs and log-sum-exps.

    Raises
    ------
    BackendUnavailableError
        If it cannot be built.
    """

    def both(attend: Callable[[Tensor, CodedKV, float], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        def joined(query: Tensor, coded: CodedKV) -> Tensor:
            output, lse = attend(query, coded, dim**-0.5)
            return torch.cat([output.double(), lse.double().clamp(min=LOWEST)[..., None]], -1)

        return joined

    worst = []
    for length, reading in ((1, Reading()), (3, Reading(0.25)), (1, Reading(0.25, rest=False))):
        coded = _trial_block(dim, value_dim, reading)

        def case(keys: choice.Draw, _: choice.Draw, __: torch.device, length: int = length, coded: CodedKV = coded) -> tuple[Any, ...]:
            return keys(2, 6, length, dim), coded

        worst.append(choice.difference(both(_coded_cpp.attend), both(reference), case, device, dtypes))
    return torch.tensor(worst, dtype=torch.float64).max().item()  # NaN if any is


def _trial_block(dim: int, value_dim: int, reading: Reading) -> CodedKV:
    """Rows that are swapped, an empty head, and entries in rungs of all kinds."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    def books(width: int) -> Books:
        fine, residual = (draw(2, width // 8, 256, 8).half() for _ in range(2))
        return Books(fine, residual * 0.3, draw(2, width // 16, 256, 16).half() if width % 16 == 0 else None)

    names = ["pr2", "rvq", "pq", "c3", "kivi2", *(["pq16"] if dim % 16 == value_dim % 16 == 0 else [])]
    placement = torch.randint(len(names) + 1, (2, 2, 300), generator=generator)
    placement[1, 0] = 0
    coder = Coder(tuple(RUNGS[name] for name in names), LayerBooks(books(dim), books(value_dim)), reading)
    vision = torch.ones(2, 300, dtype=torch.bool)
    coded = coder.encode(draw(2, 2, 300, dim), draw(2, 2, 300, value_dim), vision, placement.to(torch.uint8))
    assert coded is not None
    return coded.select((1, 0))
