# SPDX-License-Identifier: Apache-2.0
"""What a layer holds of a prompt in few bits: its tiers, one for each rung."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .books import COARSE_PART, PART, LayerBooks
from .codecs import Codec, Codes, Places, groups_of
from .packed import PackedKV
from .precision import as_written
from .ragged import Ragged
from .rungs import Rung


@dataclass(frozen=True)
class Reading:
    """What a decoding step reads of the coded entries of a row.

    Parameters
    ----------
    share : float
        Share of the entries of each KV head that a query reads, those that their index says it attends to most, at
        least one; 1 for all.
    rest : bool
        Whether the entries that are not read stand in by their index logits and the mean value of their head.
    """

    share: float = 1.0
    rest: bool = True

    @property
    def stands_in(self) -> bool:
        """Whether something stands in for entries that are not read."""
        return self.share < 1 and self.rest

    def entries(self, held: int) -> int:
        """How many of the entries of a head a query reads."""
        return held if self.share == 1 else min(held, max(1, int(self.share * held + 0.5)))


ALL = Reading()


def needs_means(rungs: Iterable[Rung], reading: Reading) -> tuple[bool, bool, bool]:
    """Whether rungs and reading need the means of keys, those of values, and what stands in for the rest."""
    rungs = tuple(rungs)
    return any(rung.keys.centred for rung in rungs), any(rung.values.centred for rung in rungs), reading.stands_in


@dataclass(frozen=True)
class Tier(Ragged):
    """An immutable, ragged block of codes of one rung.

    Parameters
    ----------
    rung : Rung
        What the codes are.
    keys, values : Codes
        Of the entries of all stored rows and heads.
    counts, rows
        See `plphp.kernels.ragged.Ragged`.
    """

    rung: Rung
    keys: Codes
    values: Codes
    counts: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        self.check_entries(len(self.keys.streams[0]))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.keys.streams[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and groups."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def stored_counts(self) -> Tensor:
        """int32 [stored rows * kv_heads] on the device of the codes: the number of entries of each."""
        counts = torch.tensor([count for row in self.counts for count in row], dtype=torch.int32)
        return counts.to(self.device, non_blocking=True)

    def pair_of_entries(self) -> tuple[Tensor, Tensor]:
        """Of each entry its pair, ``stored row * kv_heads + KV head``, and its place in it, int64 [entries] each.

        They take more memory than codes and are made anew at every call, on the device: a step that is being captured
        in a CUDA graph must not bring anything from the host.
        """
        counts = self.stored_counts.long()
        pair = torch.repeat_interleave(counts, output_size=sum(map(sum, self.counts)))
        place = torch.arange(len(pair), device=pair.device) - (counts.cumsum(0) - counts)[pair]
        return pair, place

    def places(self, means: tuple[Tensor | None, Tensor | None], books: LayerBooks | None) -> tuple[Places, Places]:
        """Where the entries of keys and of values lie, and what they share."""
        pair, place = self.pair_of_entries()
        counts = tuple(count for row in self.counts for count in row)
        sides: list[Places] = []
        for mean, book in zip(means, (None, None) if books is None else (books.keys, books.values), strict=True):
            sides.append(Places(pair, place, counts, self.kv_heads, mean, book))
        return sides[0], sides[1]

    def of_rows(self, live: Sequence[int], rows: tuple[int, ...]) -> Tier:
        """Those of some stored rows, in this order and as often as they are named."""
        if list(live) == list(range(len(self.counts))):
            return replace(self, rows=rows)
        keys = Codes.joined([self._part(self.rung.keys, self.keys, row) for row in live])
        values = Codes.joined([self._part(self.rung.values, self.values, row) for row in live])
        return Tier(self.rung, keys, values, tuple(self.counts[row] for row in live), rows)

    def _part(self, codec: Codec, codes: Codes, stored_row: int) -> Codes:
        """The codes of a stored row."""
        groups = slice(0)
        if codec.group:
            of_rows = [sum(groups_of(row, codec.group)) for row in self.counts]
            groups = slice(sum(of_rows[:stored_row]), sum(of_rows[: stored_row + 1]))
        return codes.taken(self.entries_of(stored_row), groups)

    def among(self, before: int, after: int) -> Tier:
        """The same rows with others around them, which hold nothing."""
        nothing = len(self.counts)
        rows = ((nothing,) * before) + self.rows + ((nothing,) * after)
        return replace(self, counts=(*self.counts, (0,) * self.kv_heads), rows=rows)

    def picked(self, keep: Tensor, held: Tensor) -> Tier:
        """Make rows that each take some entries of this tier's only row, whose codes depend on no other entry.

        Parameters
        ----------
        keep : Tensor
            bool [rows, kv_heads, seq]; all of them held.
        held : Tensor
            bool [1, kv_heads, seq]; the entries that the tier holds.
        """
        number = (held.to(self.device).flatten().cumsum(0) - 1).expand(len(keep), -1)
        entries = number[keep.to(self.device).flatten(1)]
        counts = tuple(tuple(row) for row in keep.sum(-1).tolist())
        none = slice(0)
        return Tier(
            self.rung,
            self.keys.taken(entries, none),
            self.values.taken(entries, none),
            counts,
            tuple(range(len(keep))),
        )


class Readers(NamedTuple):
    """Rows of the batch that all recall, or that all read everything, as tensors on the device of the codes.

    Parameters
    ----------
    recall : bool
        Whether they recall.
    longest : int
        Most entries of a head, at least 1.
    rows, stored : Tensor
        int64 [rows]; their numbers in the batch, and the stored rows that they read.
    wanted : Tensor
        int64 [rows, kv_heads]; how many entries a query reads.
    stands_in : Tensor
        bool [rows]; whether something stands in for the rest.
    """

    recall: bool
    longest: int
    rows: Tensor
    stored: Tensor
    wanted: Tensor
    stands_in: Tensor


@dataclass(frozen=True)
class CodedKV:
    """What a layer holds of one prompt in few bits. Immutable; blocks of several prompts lie beside each other.

    Parameters
    ----------
    tiers : tuple of Tier
        With as many stored rows, and the same ``rows``.
    key_means, value_means : Tensor, optional
        float16 [stored rows * kv_heads, dim]; means over the vision tokens of the prompt, where a tier needs them.
    books : LayerBooks, optional
        Codebooks of the layer. They belong to the model and are no part of `nbytes`.
    reading : tuple of Reading
        By stored row, what a step reads of its entries.
    rest_values : Tensor, optional
        float16 [stored rows * kv_heads, dim]; the mean of what the values of a head stand for, where it stands in for
        what a step does not read.
    """

    tiers: tuple[Tier, ...]
    key_means: Tensor | None
    value_means: Tensor | None
    books: LayerBooks | None
    reading: tuple[Reading, ...]
    rest_values: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CodedKV:
        # By hand, without what a kernel has worked out of this block: there are addresses of its tensors in it.
        return CodedKV(**{part.name: copy.deepcopy(getattr(self, part.name), memo) for part in fields(self)})

    @property
    def rows(self) -> tuple[int, ...]:
        """For each row of the batch, the stored row that it reads."""
        return self.tiers[0].rows

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.rows)

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.tiers[0].kv_heads

    @property
    def value_dim(self) -> int:
        """Channels of the values."""
        codec, stream = self.tiers[0].rung.values, self.tiers[0].values.streams[0]
        return stream.shape[1] * (COARSE_PART if codec.books[:1] == ("coarse",) else PART)

    @property
    def means_nbytes(self) -> int:
        """Bytes of the means, and of what stands in for the rest."""
        return sum(tensor.nbytes for tensor in (*self.means, self.rest_values) if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, groups and means."""
        return sum(tier.nbytes for tier in self.tiers) + self.means_nbytes

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """``[stored row][kv head]``: entries of all tiers."""
        return tuple(
            tuple(map(sum, zip(*(tier.counts[row] for tier in self.tiers), strict=True)))
            for row in range(len(self.reading))
        )

    @property
    def recalls(self) -> bool:
        """Whether a step leaves any of the entries unread."""
        return any(reading.share < 1 for reading in self.reading)

    @cached_property
    def readers(self) -> tuple[tuple[Readers, ...], Tensor]:
        """Those of the rows that read everything and those of the rows that recall; and where each row of the batch is
        when they lie behind each other, int64 [batch]. Made once, as a step that is being captured in a CUDA graph must
        not bring anything from the host."""
        parts, order = [], []
        for recall in (False, True):
            rows = [row for row, stored in enumerate(self.rows) if (self.reading[stored].share < 1) == recall]
            if not rows:
                continue
            stored = [self.rows[row] for row in rows]
            wanted = [[self.reading[row].entries(count) for count in self.held[row]] for row in stored]
            stands_in = [self.reading[row].stands_in for row in stored]
            longest = max(1, *(count for row in stored for count in self.held[row]))
            tensors = (self._on_device(numbers) for numbers in (rows, stored, wanted, stands_in))
            parts.append(Readers(recall, longest, *tensors))
            order += rows
        return tuple(parts), self._on_device(sorted(range(len(order)), key=order.__getitem__))

    def _on_device(self, numbers: Sequence[Any]) -> Tensor:
        with torch.inference_mode(False):  # what is made in a step without gradients is read in those with them, too
            return torch.tensor(numbers).to(self.tiers[0].device)

    def select(self, rows: Sequence[int]) -> CodedKV:
        """Take rows of the batch in a new order; stored rows that nobody reads any more are freed."""
        return self._stored(*self.tiers[0].selected(rows))

    def unshared(self) -> CodedKV:
        """The same rows, each with a stored row of its own, in the order of the batch."""
        return self._stored(self.rows, tuple(range(self.batch)))

    def _stored(self, live: Sequence[int], rows: tuple[int, ...]) -> CodedKV:
        """Those of some stored rows, of which each row of the batch reads one."""
        with as_written(self.tiers[0].device):  # autocast on a CPU joins no float16
            tiers = tuple(tier.of_rows(live, rows) for tier in self.tiers)
            if list(live) == list(range(len(self.reading))):
                return replace(self, tiers=tiers)
            keys, values, rest = (self._of_rows(mean, live) for mean in (*self.means, self.rest_values))
        return CodedKV(tiers, keys, values, self.books, tuple(self.reading[row] for row in live), rest)

    def among(self, before: int, after: int) -> CodedKV:
        """The same rows with others around them, for which nothing is held."""
        tiers = tuple(tier.among(before, after) for tier in self.tiers)
        keys, values, rest = (
            None if mean is None else pad(mean, (0, 0, 0, self.kv_heads)) for mean in (*self.means, self.rest_values)
        )
        return CodedKV(tiers, keys, values, self.books, (*self.reading, ALL), rest)

    @property
    def means(self) -> tuple[Tensor | None, Tensor | None]:
        """Means of keys and of values."""
        return self.key_means, self.value_means

    def decoded(self, dtype: torch.dtype, *, values: bool = True, index: bool = False) -> list[PackedKV]:
        """What the codes stand for, tier by tier.

        Parameters
        ----------
        dtype : torch.dtype
            Of the result.
        values : bool
            Whether values are needed; otherwise the keys stand in their place.
        index : bool
            Whether keys are what the index alone says of them.
        """
        result = []
        for tier in self.tiers:
            of_keys, of_values = tier.places(self.means, self.books)
            look = tier.rung.keys.index if index else tier.rung.keys.decode
            keys = look(tier.keys, of_keys, dtype)
            own = tier.rung.values.decode(tier.values, of_values, dtype) if values else keys
            result.append(PackedKV(keys, own, tier.counts, tier.rows))
        return result

    def _of_rows(self, mean: Tensor | None, live: Sequence[int]) -> Tensor | None:
        if mean is None:
            return None
        return torch.cat([mean[row * self.kv_heads : (row + 1) * self.kv_heads] for row in live])
