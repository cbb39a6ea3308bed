# SPDX-License-Identifier: Apache-2.0
"""From keys and values to what a layer holds of them in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .books import LayerBooks
from .codecs import Codes, stored
from .coded import ALL, CodedKV, Reading, Tier, needs_means
from .precision import as_written
from .rungs import Rung

Means = tuple[Tensor | None, Tensor | None]
"""Means of keys and of values, float16 [batch * kv_heads, dim] each."""


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
            If a rung cannot hold such entries; `plphp.kernels.codecs.ScaleError` where that lies in their numbers, of
            which each KV head of a row is asked for its own.
        ConfigError
            If the codebooks are of another model.
        """
        masks = [placement == number for number in range(1, len(self.rungs) + 1)]
        used = [(rung, mask) for rung, mask in zip(self.rungs, masks, strict=True) if bool(mask.any())]
        if not used:
            return None
        books = None if self.books is None else self.books.to(keys.device)
        rungs = [rung for rung, _ in used]
        _check(rungs, keys, values, books)
        # Heads that hold nothing here have no mean: there may be NaN in them, for which they are kept whole.
        holding = torch.stack([mask for _, mask in used]).any(0).any(-1, keepdim=True)
        means = rung_means(keys, values, vision.to(keys.device)[:, None] & holding, rungs)
        tiers = tuple(encoded(rung, keys, values, mask, means, books) for rung, mask in used)
        used_books = books if any(rung.needs_books for rung, _ in used) else None
        return with_rest(CodedKV(tiers, *means, used_books, (self.reading,) * len(keys)))


def rung_means(keys: Tensor, values: Tensor, vision: Tensor, rungs: Sequence[Rung]) -> Means:
    """The means over vision tokens, bool [batch, kv_heads or 1, seq], that rungs need; float16 [batch * kv_heads, dim]
    of keys and of values."""
    of_keys, of_values, _ = needs_means(rungs, ALL)
    return _mean(keys, vision) if of_keys else None, _mean(values, vision) if of_values else None


def with_rest(block: CodedKV) -> CodedKV:
    """The block with what stands in for entries that a step does not read, where a row asks for it."""
    if not any(reading.stands_in for reading in block.reading):
        return block
    total: Tensor | int = 0
    for tier, decoded in zip(block.tiers, block.decoded(torch.float32), strict=True):
        pair = tier.pair_of_entries()[0]
        total = total + decoded.values.new_zeros(
            len(block.reading) * block.kv_heads, decoded.values.shape[1]
        ).index_add_(0, pair, decoded.values)
    assert isinstance(total, Tensor)
    counts = torch.tensor([count for row in block.held for count in row], dtype=total.dtype).to(total.device)
    return replace(block, rest_values=stored(total / counts.clamp(min=1)[:, None]))


def encoded(
    rung: Rung,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    means: Means,
    books: LayerBooks | None,
) -> Tier:
    """Hold entries in a rung.

    Parameters
    ----------
    rung : Rung
        It can hold them, see `Rung.check`.
    keys, values : Tensor
        [batch, kv_heads, seq, dim].
    mask : Tensor
        bool [batch, kv_heads, seq]; the entries.
    means : tuple of Tensor or None
        See `CodedKV`.
    books : LayerBooks, optional
        Codebooks of the layer.
    """
    counts = tuple(tuple(row) for row in mask.sum(-1).tolist())
    blank = Codes((torch.empty(sum(map(sum, counts)), 0, dtype=torch.uint8, device=keys.device),))
    rows = tuple(range(len(keys)))
    of_keys, of_values = Tier(rung, blank, blank, counts, rows).places(means, books)
    return Tier(
        rung,
        rung.keys.encode(_wide(keys[mask]), of_keys),
        rung.values.encode(_wide(values[mask]), of_values),
        counts,
        rows,
    )


def _check(rungs: Sequence[Rung], keys: Tensor, values: Tensor, books: LayerBooks | None) -> None:
    """Raise an error unless rungs can hold such keys and values, with these codebooks."""
    for rung in rungs:
        rung.check(keys.shape[3], values.shape[3], books)
    if books is not None and any(rung.needs_books for rung in rungs):
        books.check(keys.shape[1], keys.shape[3], values.shape[3])


def _mean(states: Tensor, vision: Tensor) -> Tensor:
    wide, weight = _wide(states), vision.to(states.device)[..., None]
    total = torch.where(weight, wide, 0).sum(2)
    return stored((total / weight.sum(2).clamp(min=1)).flatten(0, 1))


def _wide(states: Tensor) -> Tensor:
    """States in a dtype to work in."""
    return states.detach().to(torch.promote_types(states.dtype, torch.float32))


def coded_rows(
    keys: Tensor,
    values: Tensor,
    vision: Tensor,
    placement: Tensor,
    coders: Sequence[Coder | None],
) -> tuple[CodedKV, ...]:
    """Hold the entries of one prompt in few bits for several coders, a row for each.

    What the coders would do one by one, but codes that depend on no other entry are made once.

    Parameters
    ----------
    keys, values : Tensor
        [1, kv_heads, seq, dim].
    vision : Tensor
        bool [1, seq].
    placement : Tensor
        uint8 [coders, kv_heads, seq], see `Coder.encode`.
    coders : sequence of Coder or None
        None where nothing is coded.

    Returns
    -------
    tuple of CodedKV
        A block for every set of codebooks, with a row for each coder.
    """
    blocks = []
    own = [coder for coder in coders if coder is not None]
    for books in {id(coder.books): coder.books for coder in own}.values():
        sharing = [coder if coder is not None and coder.books is books else None for coder in coders]
        with as_written(keys.device):
            block = _block(keys, values, vision, placement, sharing, books)
        blocks += [] if block is None else [block]
    return tuple(blocks)


def _block(
    keys: Tensor,
    values: Tensor,
    vision: Tensor,
    placement: Tensor,
    coders: Sequence[Coder | None],
    books: LayerBooks | None,
) -> CodedKV | None:
    """A block with a row for each coder, all of which have the same codebooks."""
    asked = dict.fromkeys(rung for coder in coders if coder is not None for rung in coder.rungs)
    masks = {
        rung: torch.stack([_held_in(rung, row, coder) for row, coder in zip(placement, coders, strict=True)])
        for rung in asked
    }
    masks = {rung: mask for rung, mask in masks.items() if bool(mask.any())}
    if not masks:
        return None
    reading = tuple(ALL if coder is None else coder.reading for coder in coders)
    holding = torch.stack(list(masks.values())).any(0).any(0).any(-1, keepdim=True)
    means = rung_means(keys, values, vision.to(keys.device)[:, None] & holding.to(keys.device), tuple(masks))
    books = None if books is None else books.to(keys.device)
    _check(tuple(masks), keys, values, books)
    of_rows = [None if mean is None else mean.repeat(len(coders), 1) for mean in means]
    tiers = []
    for rung, mask in masks.items():
        if not rung.group:
            held = mask.any(0, keepdim=True)
            tiers.append(encoded(rung, keys, values, held, means, books).picked(mask, held))
        else:
            spread = [states.expand(len(coders), -1, -1, -1) for states in (keys, values)]
            tiers.append(encoded(rung, spread[0], spread[1], mask, (of_rows[0], of_rows[1]), books))
    needed = books if any(rung.needs_books for rung in masks) else None
    return with_rest(CodedKV(tuple(tiers), of_rows[0], of_rows[1], needed, reading))


def _held_in(rung: Rung, placement: Tensor, coder: Coder | None) -> Tensor:
    """Which entries of a row a coder holds in a rung, bool [kv_heads, seq]."""
    if coder is None or rung not in coder.rungs:
        return torch.zeros_like(placement, dtype=torch.bool)
    return placement == 1 + coder.rungs.index(rung)
