# SPDX-License-Identifier: Apache-2.0
"""Putting entries of many places into one tier: codes as they are, and states that are to be coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .books import LayerBooks
from .codecs import Codes, Places
from .coded import Tier
from .coder import Means
from .precision import as_written
from .ragged import counts_of
from .rungs import Rung


@dataclass(frozen=True)
class Moving:
    """Entries on their way.

    Parameters
    ----------
    pair : Tensor
        int64 [entries] on the CPU; ``row * kv_heads + KV head`` of each, where they go.
    position : Tensor
        int64 [entries] on the CPU; the order of the entries of a pair.
    keys, values : Tensor or Codes
        Their states, [entries, dim], or their codes.
    """

    pair: Tensor
    position: Tensor
    keys: Tensor | Codes
    values: Tensor | Codes


def taken(tier: Tier, entries: Tensor) -> tuple[Codes, Codes]:
    """The codes of some entries, int64 [taken], of a tier whose codes depend on no other entry."""
    own, none = entries.to(tier.device), slice(0)
    return tier.keys.taken(own, none), tier.values.taken(own, none)


def decoded_entries(
    tier: Tier, entries: Tensor, means: Means, books: LayerBooks | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the codes of some entries of a tier stand for, [taken, dim] each."""
    own = entries.to(tier.device)
    if tier.rung.group:  # where a group begins only the whole tier tells
        of_keys, of_values = tier.places(means, books)
        keys = tier.rung.keys.decode(tier.keys, of_keys, dtype)
        return keys[own], tier.rung.values.decode(tier.values, of_values, dtype)[own]
    pair = tier.pair_of_entries()[0][own]
    of_keys, of_values = places_of(pair, tier.kv_heads, means, books)
    codes = taken(tier, entries)
    return tier.rung.keys.decode(codes[0], of_keys, dtype), tier.rung.values.decode(codes[1], of_values, dtype)


def places_of(pair: Tensor, kv_heads: int, means: Means, books: LayerBooks | None) -> tuple[Places, Places]:
    """Where entries lie whose codes depend on no other entry; ``pair`` is int64 [entries] on their device."""
    nowhere = torch.zeros_like(pair)
    of_books = (None, None) if books is None else (books.keys, books.values)
    keys, values = zip(means, of_books, strict=True)
    return Places(pair, nowhere, (), kv_heads, *keys), Places(pair, nowhere, (), kv_heads, *values)


def tier_of(
    rung: Rung, pieces: Sequence[Moving], rows: int, kv_heads: int, means: Means, books: LayerBooks | None
) -> tuple[Tier, Tensor]:
    """A tier of entries of several places, whose codes depend on no other entry.

    Returns
    -------
    tier : Tier
    order : Tensor
        int64 [entries]; for each entry of the tier its place among the pieces, one behind the other.
    """
    pair = torch.cat([piece.pair for piece in pieces])
    position = torch.cat([piece.position for piece in pieces])
    order = position.argsort(stable=True)
    order = order[pair[order].argsort(stable=True)]
    codes = [_coded(rung, piece, kv_heads, means, books) for piece in pieces]
    with as_written(codes[0][0].streams[0].device):
        keys, values = (Codes.joined([own[side] for own in codes]) for side in (0, 1))
    on_device, none = order.to(keys.streams[0].device), slice(0)
    counts = counts_of(pair, rows, kv_heads)
    tier = Tier(rung, keys.taken(on_device, none), values.taken(on_device, none), counts, tuple(range(rows)))
    return tier, order


def _coded(rung: Rung, piece: Moving, kv_heads: int, means: Means, books: LayerBooks | None) -> tuple[Codes, Codes]:
    if isinstance(piece.keys, Codes) and isinstance(piece.values, Codes):
        return piece.keys, piece.values
    assert isinstance(piece.keys, Tensor)
    assert isinstance(piece.values, Tensor)
    of_keys, of_values = places_of(piece.pair.to(piece.keys.device), kv_heads, means, books)
    return rung.keys.encode(piece.keys, of_keys), rung.values.encode(piece.values, of_values)
