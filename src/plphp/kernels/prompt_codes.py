# SPDX-License-Identifier: Apache-2.0
"""What a layer holds in few bits of many prompts, in one block: a row of the batch reads a stored row of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codecs import Codes
from .coded import CodedKV, Tier
from .packed import PackedKV
from .precision import as_written
from .rungs import Rung


@dataclass(frozen=True)
class PromptCodes:
    """Codes of several prompts, with the means of each prompt.

    A *part* is what is held of one prompt in one row of the batch: a row of ``block``. So the entries of hundreds of
    prompts are a few tensors, and attention over them is one call (`plphp.kernels.prompt_attention`). Immutable.

    Parameters
    ----------
    block : CodedKV
        Its rows are the parts.
    owners : tuple of int
        For each part, the row of the batch that reads it.
    prompts : tuple of int
        For each part, the logical position at which its prompt begins.
    batch : int
        Rows of the batch.
    """

    block: CodedKV
    owners: tuple[int, ...]
    prompts: tuple[int, ...]
    batch: int

    @classmethod
    def of(cls, block: CodedKV, prompt: int) -> PromptCodes:
        """What is held of one prompt; rows that hold nothing of it have no part."""
        parts = [row for row, stored in enumerate(block.rows) if any(block.held[stored])]
        return cls(block.select(parts), tuple(parts), (prompt,) * len(parts), block.batch)

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.block.kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, groups and means."""
        return self.block.nbytes

    @property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """``[stored row][kv head]``: entries of all tiers."""
        return self.block.held

    @cached_property
    def readers(self) -> Tensor:
        """For each part the row of the batch that reads it, int64 [parts] on the device of the codes."""
        with torch.inference_mode(False):  # see `CodedKV.readers`
            return torch.tensor(self.owners, dtype=torch.int64).to(self.block.tiers[0].device)

    @cached_property
    def parts(self) -> Tensor:
        """For each row of the batch its parts, int64 [batch, most] on the device of the codes; -1 behind them."""
        rows = [[part for part, owner in enumerate(self.owners) if owner == row] for row in range(self.batch)]
        most = max(map(len, rows))
        with torch.inference_mode(False):
            filled = [[*own, *[-1] * (most - len(own))] for own in rows]
            return torch.tensor(filled, dtype=torch.int64).to(self.block.tiers[0].device)

    @property
    def is_plain(self) -> bool:
        """Whether every row of the batch has one part, in order."""
        return self.owners == tuple(range(self.batch))

    def parts_of(self, rows: Sequence[int]) -> list[int]:
        """The parts that rows of the batch read, row after row."""
        parts: dict[int, list[int]] = {}
        for part, owner in enumerate(self.owners):
            parts.setdefault(owner, []).append(part)
        return [part for row in rows for part in parts.get(row, [])]

    def select(self, rows: Sequence[int]) -> PromptCodes:
        """Take rows of the batch in a new order; parts that nobody reads any more are freed."""
        parts = self.parts_of(rows)
        if not parts:  # a row that holds nothing says so: `held`
            return PromptCodes(self.block.among(0, 1).select([len(self.owners)]), (0,), (0,), len(rows))
        read = Counter(self.owners)
        owners = [new for new, row in enumerate(rows) for _ in range(read[row])]
        return PromptCodes(
            self.block.select(parts), tuple(owners), tuple(self.prompts[part] for part in parts), len(rows)
        )

    def unshared(self) -> PromptCodes:
        """The same with a stored row of its own for every part."""
        return replace(self, block=self.block.unshared())

    def appended(self, newer: PromptCodes) -> PromptCodes:
        """Put the parts of newer prompts behind those of this block."""
        return PromptCodes(
            stacked([self.block, newer.block]),
            self.owners + newer.owners,
            self.prompts + newer.prompts,
            self.batch,
        )

    def decoded(self, dtype: torch.dtype, *, values: bool = True, index: bool = False) -> list[PackedKV]:
        """What the codes stand for, tier by tier, in the rows of the batch, see `CodedKV.decoded`."""
        return [self._of_batch(tier) for tier in self.block.decoded(dtype, values=values, index=index)]

    def _of_batch(self, tier: PackedKV) -> PackedKV:
        """The entries of all parts of a row behind each other, head by head."""
        tier = tier.unshared()
        pair = tier.pairs()
        owners = torch.tensor(self.owners)
        pair = owners[pair // self.kv_heads] * self.kv_heads + pair % self.kv_heads
        order = pair.argsort(stable=True)
        return tier.of_entries(order, pair[order], self.batch)


def plain(blocks: Iterable[CodedKV | PromptCodes]) -> list[CodedKV]:
    """The blocks of codes, whose rows are those of the batch, or parts of them."""
    return [block.block if isinstance(block, PromptCodes) else block for block in blocks]


def stacked(blocks: Sequence[CodedKV]) -> CodedKV:
    """Put the rows of several blocks below each other; what one of them has no tier or no mean for holds nothing there.

    Those that have codebooks have the same.
    """
    rungs = list(dict.fromkeys(tier.rung for block in blocks for tier in block.tiers))
    with as_written(blocks[0].tiers[0].device):
        tiers = tuple(_stacked_tier(rung, blocks) for rung in rungs)
        means = zip(*((*block.means, block.rest_values) for block in blocks), strict=True)
        keys, values, rest = (_stacked_means(own, blocks) for own in means)
    books = next((block.books for block in blocks if block.books is not None), None)
    return CodedKV(tiers, keys, values, books, tuple(own for block in blocks for own in block.reading), rest)


def _stacked_tier(rung: Rung, blocks: Sequence[CodedKV]) -> Tier:
    counts: list[tuple[int, ...]] = []
    rows: list[int] = []
    held: list[Tier] = []
    for block in blocks:
        rows += [len(counts) + row for row in block.rows]
        own = next((tier for tier in block.tiers if tier.rung == rung), None)
        nothing = ((0,) * block.kv_heads,) * len(block.reading)
        counts += nothing if own is None else own.counts
        held += [] if own is None else [own]
    keys, values = Codes.joined([tier.keys for tier in held]), Codes.joined([tier.values for tier in held])
    return Tier(rung, keys, values, tuple(counts), tuple(rows))


def _stacked_means(means: Sequence[Tensor | None], blocks: Sequence[CodedKV]) -> Tensor | None:
    known = next((mean for mean in means if mean is not None), None)
    if known is None:
        return None
    blank = known[:0]
    sizes = [len(block.reading) * block.kv_heads for block in blocks]
    return torch.cat(
        [pad(blank, (0, 0, 0, size)) if mean is None else mean for mean, size in zip(means, sizes, strict=True)]
    )
