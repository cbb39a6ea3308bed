# SPDX-License-Identifier: Apache-2.0
"""What a layer holds of a prompt in few bits: its tiers, one for each rung."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .books import LayerBooks
from .codecs import Codec, Codes, Places, groups_of, stored
from .packed import PackedKV
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

    def entries(self, held: int) -> int:
        """How many of the entries of a head a query reads."""
        return held if self.share == 1 else min(held, max(1, int(self.share * held + 0.5)))


ALL = Reading()


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

    @property
    def index_nbytes(self) -> int:
        """Those of them that the index is made of."""
        shared = [tensor for tensor in (self.keys.groups,) if tensor is not None]
        # Where there are codebooks, the index is centroids without a scale.
        scaled = self.keys.scales is not None and not getattr(self.rung.keys, "books", ())
        shared += [self.keys.scales] if scaled and self.keys.scales is not None else []
        return self.keys.streams[0].nbytes + sum(tensor.nbytes for tensor in shared)

    def decoded(self, means: tuple[Tensor | None, Tensor | None], books: LayerBooks | None) -> tuple[Places, Places]:
        """Where the entries of keys and of values lie, and what they share."""
        pair, place = self.pair_of_entries()
        counts = tuple(count for row in self.counts for count in row)
        sides: list[Places] = []
        for mean, book in zip(means, (None, None) if books is None else (books.keys, books.values), strict=True):
            sides.append(Places(pair, place, counts, self.kv_heads, mean, book))
        return sides[0], sides[1]

    def of_rows(self, live: Sequence[int], rows: tuple[int, ...]) -> Tier:
        """Those of some stored rows, in their order."""
        if len(live) == len(self.counts):
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

    def picked(self, keep: Tensor) -> Tier:
        """Make rows that each take some entries of this tier's only row, whose codes depend on no other entry.

        Parameters
        ----------
        keep : Tensor
            bool [rows, kv_heads, seq]; the tier holds ``seq`` entries for each head.
        """
        entries = keep.to(self.device).flatten().nonzero()[:, 0] % len(self.keys.streams[0])
        counts = tuple(tuple(row) for row in keep.sum(-1).tolist())
        none = slice(0)
        return Tier(
            self.rung,
            self.keys.taken(entries, none),
            self.values.taken(entries, none),
            counts,
            tuple(range(len(keep))),
        )


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
    """

    tiers: tuple[Tier, ...]
    key_means: Tensor | None
    value_means: Tensor | None
    books: LayerBooks | None
    reading: tuple[Reading, ...]

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
    def means_nbytes(self) -> int:
        """Bytes of the means."""
        return sum(tensor.nbytes for tensor in (self.key_means, self.value_means) if tensor is not None)

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

    def select(self, rows: Sequence[int]) -> CodedKV:
        """Take rows of the batch in a new order; stored rows that nobody reads any more are freed."""
        live, read = self.tiers[0].selected(rows)
        tiers = tuple(tier.of_rows(live, read) for tier in self.tiers)
        if len(live) == len(self.reading):
            return replace(self, tiers=tiers)
        means = [None if mean is None else self._of_rows(mean, live) for mean in (self.key_means, self.value_means)]
        return CodedKV(tiers, means[0], means[1], self.books, tuple(self.reading[row] for row in live))

    @classmethod
    def stacked(cls, blocks: Sequence[CodedKV]) -> CodedKV:
        """Put the rows of several blocks of one layer below each other, whose rows are in the order stored."""
        books = next((block.books for block in blocks if block.books is not None), None)
        rungs = list(dict.fromkeys(tier.rung for block in blocks for tier in block.tiers))
        stored_rows = sum(len(block.reading) for block in blocks)
        tiers = tuple(_stacked(rung, blocks, stored_rows) for rung in rungs)
        means = [_stacked_means([block.means[side] for block in blocks], blocks) for side in (0, 1)]
        return cls(tiers, means[0], means[1], books, tuple(reading for block in blocks for reading in block.reading))

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
            of_keys, of_values = tier.decoded(self.means, self.books)
            look = tier.rung.keys.index if index else tier.rung.keys.decode
            keys = look(tier.keys, of_keys, dtype)
            own = tier.rung.values.decode(tier.values, of_values, dtype) if values else keys
            result.append(PackedKV(keys, own, tier.counts, tier.rows))
        return result

    def _of_rows(self, mean: Tensor, live: Sequence[int]) -> Tensor:
        return torch.cat([mean[row * self.kv_heads : (row + 1) * self.kv_heads] for row in live])


def _stacked(rung: Rung, blocks: Sequence[CodedKV], stored_rows: int) -> Tier:
    """The tiers of one rung below each other; a block without it has no entries in it."""
    keys, values, counts = [], [], []
    for block in blocks:
        own = next((tier for tier in block.tiers if tier.rung == rung), None)
        if own is None:
            counts += [(0,) * block.kv_heads] * len(block.reading)
        else:
            keys.append(own.keys)
            values.append(own.values)
            counts += own.counts
    return Tier(rung, Codes.joined(keys), Codes.joined(values), tuple(counts), tuple(range(stored_rows)))


def _stacked_means(means: Sequence[Tensor | None], blocks: Sequence[CodedKV]) -> Tensor | None:
    """Means below each other; 0 for the rows of a block without."""
    some = next((mean for mean in means if mean is not None), None)
    if some is None:
        return None
    pairs = [len(block.reading) * block.kv_heads for block in blocks]
    return torch.cat([some.new_zeros(n, some.shape[1]) if m is None else m for m, n in zip(means, pairs, strict=True)])


@dataclass(frozen=True)
class Coder:
    """Makes the tiers of a layer.

    Parameters
    ----------
    rungs : tuple of Rung
        Those of a ladder, from its top.
    books : LayerBooks, optional
        Codebooks of the layer.
    reading : Reading
        What a step is to read.
    """

    rungs: tuple[Rung, ...]
    books: LayerBooks | None = None
    reading: Reading = ALL

    def encode(self, keys: Tensor, values: Tensor, vision: Tensor, placement: Tensor) -> CodedKV | None:
        """Hold entries in few bits.

        Parameters
        ----------
        keys, values : Tensor
            [batch, kv_heads, seq, dim].
        vision : Tensor
            bool [batch, seq]; the tokens whose mean is taken off.
        placement : Tensor
            uint8 [batch, kv_heads, seq]; from 1 on, the number of an entry's rung. What is none of them is not coded.

        Returns
        -------
        CodedKV or None
            None where nothing is coded.

        Raises
        ------
        UnsupportedFeatureError
            If a rung cannot hold such entries.
        """
        batch = len(keys)
        masks = [placement == number for number in range(1, len(self.rungs) + 1)]
        used = [(rung, mask) for rung, mask in zip(self.rungs, masks, strict=True) if bool(mask.any())]
        if not used:
            return None
        books = None if self.books is None else self.books.to(keys.device)
        for rung, _ in used:
            rung.check(keys.shape[3], values.shape[3], books)
        means = self.means(keys, values, vision, [rung for rung, _ in used])
        tiers = []
        for rung, mask in used:
            counts = tuple(tuple(row) for row in mask.sum(-1).tolist())
            empty = torch.empty(sum(map(sum, counts)), 0, dtype=torch.uint8, device=keys.device)
            blank = Codes((empty,))
            places = Tier(rung, blank, blank, counts, tuple(range(batch))).decoded(means, books)
            of_keys = rung.keys.encode(_wide(keys[mask]), places[0])
            tiers.append(
                Tier(rung, of_keys, rung.values.encode(_wide(values[mask]), places[1]), counts, tuple(range(batch)))
            )
        used_books = books if any(rung.needs_books for rung, _ in used) else None
        return CodedKV(tuple(tiers), *means, used_books, (self.reading,) * batch)

    def means(
        self, keys: Tensor, values: Tensor, vision: Tensor, rungs: Sequence[Rung]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The means that rungs and reading need, float16 [batch * kv_heads, dim] of keys and of values."""
        of_keys = any(rung.keys.centred for rung in rungs)
        stands_in = self.reading.share < 1 and self.reading.rest
        of_values = stands_in or any(rung.values.centred for rung in rungs)
        return _mean(keys, vision) if of_keys else None, _mean(values, vision) if of_values else None


def _mean(states: Tensor, vision: Tensor) -> Tensor:
    wide, weight = _wide(states), vision.to(states.device)[:, None, :, None]
    total = torch.where(weight, wide, 0).sum(2)
    return stored((total / weight.sum(2).clamp(min=1)).flatten(0, 1))


def _wide(states: Tensor) -> Tensor:
    """States in a dtype to work in."""
    return states.detach().to(torch.promote_types(states.dtype, torch.float32))
