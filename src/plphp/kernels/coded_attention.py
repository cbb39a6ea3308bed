# SPDX-License-Identifier: Apache-2.0
"""Attention over entries that are held in few bits: all of them, or those that a query wants (recall)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from . import _coded_cpp, choice, coded_trial
from .coded import CodedKV, Readers
from .packed import PackedKV
from .precision import as_written

MAX_LOGITS = 2**24
"""Logits that are held at once; long query chunks are cut so that they stay below."""

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


def counts_reads() -> bool:
    """Whether reads are being counted, which the reference alone does."""
    return _counts.get() is not None


def attend_codes(
    query: Tensor, coded: CodedKV, scaling: float, more: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of queries over coded entries, all of them visible.

    On a CUDA device Triton kernels do it, where they can and do it right (`triton_trial`); on a CPU a C++ kernel, which
    is built when it is first used, does short queries.

    A query reads what the `Reading` of its row says. Of the entries j of a KV head, the k with the largest index mass

        m[j] = mean over the query heads of softmax_j(q . index[j] * scaling)

    are read, each query for itself, and each query head attends to what its KV head reads. With ``rest`` what is left
    has the logits of its index and, in the place of its values, the mean value of its head.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, query, dim].
    coded : CodedKV
        Of ``batch`` rows.
    scaling : float
        Factor on the logits.
    more : tuple of Tensor, optional
        Output and log-sum-exps of attention over more keys, which the result is merged with; every query has attended
        to some of them.

    Returns
    -------
    output : Tensor
        [batch, q_heads, query, value_dim], in the dtype of ``query``, or where there is more than that in a wider one.
    lse : Tensor
        Log-sum-exp of the logits, float32 or float64 [batch, q_heads, query]; -inf where a row holds nothing.
    """
    if not counts_reads():
        values = query[:1, :1, :1, :1].expand(1, 1, 1, coded.value_dim)  # of this width, and of no memory
        reason = unsupported_by_triton(query, coded)
        if choice.usable("attend_codes", "Triton", reason, triton_trial, query, values):
            from . import _coded_triton

            return merged(more, _coded_triton.attend(query, coded, scaling))
        # What the C++ kernel is not made for torch does well: that is no loss, and not logged.
        suits_cpp = _coded_cpp.unsupported(query, coded) is None
        if suits_cpp and choice.usable("attend_codes", "C++", None, cpp_trial, query, values):
            if more is None or more[0].dtype == query.dtype:
                return _coded_cpp.attend(query, coded, scaling, more)
            return merged(more, _coded_cpp.attend(query, coded, scaling))
    with as_written(query.device):
        return merged(more, reference(query, coded, scaling))


def merged(whole: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As `plphp.kernels.merge.merge_states` does, but without its guards for parts that may be empty, which take longer
    than the merge itself, for every layer of every step: the whole never is, and a part is 0 where it is."""
    if whole is None:
        return part
    dtype = torch.promote_types(whole[1].dtype, part[1].dtype)
    with as_written(whole[0].device):
        share = torch.sigmoid(part[1] - whole[1])[..., None]
        output = torch.lerp(whole[0].to(dtype), part[0].to(dtype), share.to(dtype))
        return output, torch.logaddexp(whole[1], part[1])


def unsupported_by_triton(query: Tensor, coded: CodedKV) -> str | None:
    """Say why the Triton kernels cannot attend, see `attend_codes`; None where they can."""
    reason = choice.unsupported_by_triton(query)
    return reason or choice.too_many_rows(query.shape[1] // coded.kv_heads * query.shape[2])


def triton_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the Triton kernels and the reference on small cases."""
    from . import _coded_triton

    return coded_trial.difference(_coded_triton.attend, reference, device, dtypes, dim, value_dim)


def cpp_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the C++ kernel and the reference on small cases.

    Raises
    ------
    BackendUnavailableError
        If it cannot be built.
    """
    return coded_trial.difference(_coded_cpp.attend, reference, device, dtypes, dim, value_dim)


def reference(query: Tensor, coded: CodedKV, scaling: float) -> tuple[Tensor, Tensor]:
    """As `attend_codes`, in torch: everything is decoded first. Nothing comes from the host once it has run."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(dtype) * scaling).unflatten(1, (coded.kv_heads, -1))
    order, tier_of = _in_heads(coded)
    held = _joined(coded.decoded(dtype), order)
    index = _joined(coded.decoded(dtype, values=False, index=True), order)[0] if coded.recalls else None
    counts = _counts.get()
    outputs, lses, reads = [], [], []
    readers, back = coded.readers
    # Rows that read everything are not looked up in the index.
    for own in readers:
        part = _Rows(coded, own, *held, index if own.recall else None)
        output, lse, read = part.attend(grouped[own.rows])
        outputs.append(output)
        lses.append(lse)
        if counts is not None:
            reads.append(part.of_tiers(read, tier_of))
    if counts is not None:
        counts.append(torch.cat(reads)[back])
    return torch.cat(outputs)[back].flatten(1, 2).to(query.dtype), torch.cat(lses)[back].flatten(1, 2)


class _Rows:
    """Some rows of a block, all of which recall or none, with their entries side by side.

    ``entries`` are the places of the entries of a head among all, and ``held`` says which there are, int64 and bool
    [rows, kv_heads, longest].
    """

    def __init__(self, coded: CodedKV, readers: Readers, keys: Tensor, values: Tensor, index: Tensor | None) -> None:
        self.coded, self.readers = coded, readers
        counts = torch.stack([tier.stored_counts for tier in coded.tiers]).sum(0)
        starts = counts.cumsum(0) - counts
        starts, counts = (numbers.view(-1, coded.kv_heads)[readers.stored, :, None] for numbers in (starts, counts))
        place = torch.arange(readers.longest, device=counts.device)
        self.held = place < counts
        self.entries = torch.where(self.held, starts + place, 0)
        self.keys, self.values = self._side_by_side(keys), self._side_by_side(values)
        self.index = None if index is None else self._side_by_side(index)

    def _side_by_side(self, states: Tensor) -> Tensor:
        """States [entries, dim] with 0 behind those of a head, [rows, kv_heads, longest, dim]."""
        if not len(states):
            return states.new_zeros(*self.held.shape, states.shape[1])
        return torch.where(self.held[..., None], states[self.entries], 0)

    def of_tiers(self, read: Tensor, tier_of: Tensor) -> Tensor:
        """How many entries of each tier are read, float64 [rows, tiers]."""
        tier = tier_of[self.entries]
        return read.new_zeros(len(read), len(self.coded.tiers)).scatter_add_(1, tier.flatten(1), read.flatten(1))

    def attend(self, grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output and the log-sum-exp of queries [rows, kv_heads, group, query, dim], and how often each entry is
        read, in the mean over the queries, float64 [rows, kv_heads, longest]."""
        step = max(1, MAX_LOGITS // max(1, self.held.numel() * grouped.shape[2]))
        parts = [self._attend(part) for part in grouped.split(step, 3)]
        outputs, lses, reads = zip(*parts, strict=True)
        return torch.cat(outputs, 3), torch.cat(lses, 3), torch.stack(reads).sum(0) / grouped.shape[3]

    def _attend(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = _logits(query, self.keys, self.held)
        if self.index is None:
            output, lse = _mixed(logits, self.values)
            return output, lse, self.held.double() * query.shape[3]
        of_index = _logits(query, self.index, self.held)
        read = self._chosen(of_index)
        logits = logits.masked_fill(~read[:, :, None], -torch.inf)
        values = self.values
        if self.coded.rest_values is not None:
            left = of_index.masked_fill(read[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
            left = left.masked_fill(~self.readers.stands_in[:, None, None, None, None], -torch.inf)
            rest = self.coded.rest_values.to(values.dtype).unflatten(0, (-1, self.coded.kv_heads))
            values = torch.cat([values, rest[self.readers.stored][:, :, None]], 2)
            logits = torch.cat([logits, left], -1)
        output, lse = _mixed(logits, values)
        return output, lse, read.double().sum(2)

    def _chosen(self, of_index: Tensor) -> Tensor:
        """The entries that queries read, bool [rows, kv_heads, query, longest], from the logits of the index."""
        # A mass is at most 1: all NaN are above it and alike, however a device sorts NaN.
        mass = of_index.softmax(-1).mean(2).nan_to_num(2.0).masked_fill(~self.held[:, :, None], -1.0)
        most = self.readers.wanted[:, :, None, None]
        position = torch.arange(mass.shape[-1], device=mass.device).expand_as(mass)
        order = mass.argsort(dim=-1, descending=True, stable=True)
        return (torch.empty_like(order).scatter_(-1, order, position) < most) & self.held[:, :, None]


def _in_heads(coded: CodedKV) -> tuple[Tensor, Tensor]:
    """The entries of all tiers in the order of their heads, and within a head of their tiers: int64 [entries], places
    among the entries of one tier after the other; and the number of the tier of each, int64 [entries]."""
    pair = torch.cat([tier.pair_of_entries()[0] for tier in coded.tiers])
    tiers = [pair.new_full((sum(map(sum, tier.counts)),), number) for number, tier in enumerate(coded.tiers)]
    order = pair.argsort(stable=True)
    return order, torch.cat(tiers)[order]


def _joined(tiers: list[PackedKV], order: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and the values of the entries of all tiers, [entries, dim]."""
    keys, values = (torch.cat(states)[order] for states in zip(*((t.keys, t.values) for t in tiers), strict=True))
    return keys, values


def _logits(query: Tensor, keys: Tensor, held: Tensor) -> Tensor:
    """Logits [batch, kv_heads, group, query, entries]; -inf where there is no entry."""
    logits = query @ keys[:, :, None].mT
    return logits.masked_fill_(~held[:, :, None, None], -torch.inf)


def _mixed(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of logits; 0 and -inf where there is no entry."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top.masked_fill(top == -torch.inf, 0)).exp_()
    total = weights.sum(-1, keepdim=True)
    output = weights @ values[:, :, None] / total.clamp(min=torch.finfo(total.dtype).tiny)
    return output, (top + total.log())[..., 0]
