# SPDX-License-Identifier: Apache-2.0
"""Entries of some tokens leave a layer with a ledger, or come back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plphp.kernels.packed import PackedKV

from .entries import LayerEntries
from .fading import Fading
from .fading_plan import DROPPED, STAYS, LayerShape
from .host_images import WholeLayer
from .image_table import ImageTable
from .ledger import Labels, codes_of
from .moving import Move
from .sources import Source, part_key, sources_of, unshare

ABOVE = 2.0**-10
"""By how much of the highest score a restored image is above it: scores are float32, and thousands may be restored."""


def drop(
    number: int, layer: LayerEntries, images: ImageTable, fading: Fading, gone: Callable[[Source], Tensor]
) -> None:
    """Free some entries of a layer; codes that depended on them are made again, of what they stand for.

    Parameters
    ----------
    number : int
        Decoder layer.
    layer : LayerEntries
        With a ledger.
    images, fading
        See `plphp.pruning.fading.fade`.
    gone : callable
        Of the entries of one place, which leave, bool [entries].
    """
    unshare(layer)
    shape, sources = fading.shape_of(number, layer), sources_of(layer, images)
    masks = [gone(source) for source in sources]
    if not any(bool(mask.any()) for mask in masks):
        return
    left = [
        source.with_targets(source.targets.masked_fill(mask, DROPPED))
        for source, mask in zip(sources, masks, strict=True)
    ]
    books = fading.books_of(number)
    Move(layer, codes_of(layer.coded), _together(left, shape), shape.rungs, books, fading.reading).run()


def forget(layers: Mapping[int, LayerEntries], images: ImageTable, fading: Fading, row: int, place: int) -> None:
    """Free all entries of an image.

    Parameters
    ----------
    layers, images, fading
        See `plphp.pruning.fading.fade`.
    row, place : int
        Row of the image, and its place in the row.
    """
    for number, layer in layers.items():
        if layer.ledger is not None:
            drop(number, layer, images, fading, lambda source: (source.row == row) & (source.image == place))
    images.mark_forgotten(row, place)


def insert(layer: LayerEntries, row: int, whole: WholeLayer) -> None:
    """Put whole entries of a row among those of a layer with a ledger, above all others by their scores.

    Parameters
    ----------
    layer : LayerEntries
        Every row has entries of its own, and none of these tokens.
    row : int
        Row of the batch.
    whole : WholeLayer
        The entries.
    """
    assert layer.prefix is not None
    assert layer.ledger is not None
    prefix, ledger = layer.prefix, layer.ledger
    keys, values = (states.to(prefix.device) for states in (whole.keys, whole.values))
    heads, tokens = keys.shape[:2]
    counts = tuple((tokens if own == row else 0,) * heads for own in range(prefix.batch))
    rows = tuple(range(prefix.batch))
    came = PackedKV(
        keys.flatten(0, 1).to(prefix.keys.dtype), values.flatten(0, 1).to(prefix.values.dtype), counts, rows
    )
    labels = Labels.of(whole.position.repeat(heads), _above(ledger.whole, ledger.coded, values), counts)
    joined, named = prefix.appended(came), ledger.whole.appended(labels)
    pair = joined.pairs()
    order = named.position.argsort(stable=True)
    order = order[pair[order].argsort(stable=True)]
    layer.prefix = joined.of_entries(order, pair[order], prefix.batch)
    layer.ledger = replace(ledger, whole=named.of_entries(order, pair[order], prefix.batch))


def settle(layer: LayerEntries, images: ImageTable, row: int, places: Sequence[int]) -> None:
    """Score a restored image as the newest of the others, so that it fades like it from now on.

    Its best entry has the score of the other's best, and so on down. An image that is above all others would stay whole
    at their cost, however many come.

    Parameters
    ----------
    layer : LayerEntries
        Every row has entries of its own.
    images : ImageTable
    row : int
        Row of the batch.
    places : sequence of int
        Its place in the row, or those of its tiles.
    """
    assert layer.ledger is not None
    labels = [layer.ledger.whole, *layer.ledger.coded]
    sources = sources_of(layer, images)
    image = torch.cat([source.image.masked_fill(source.row != row, -1) for source in sources])
    score = torch.cat([own.score for own in labels])
    mine = torch.isin(image, torch.tensor(places))
    newest = image.masked_fill(mine, -1).max() if len(image) else -1
    if newest < 0 or not bool(mine.any()):
        return
    model = score[image == newest].sort().values
    order = score[mine].argsort(stable=True)
    taken = score.new_empty(len(order))
    taken[order] = model[torch.arange(len(order)) * len(model) // len(order)]
    score = score.masked_scatter(mine, taken)
    whole, *coded = [
        own.with_score(part) for own, part in zip(labels, score.split([len(own.score) for own in labels]), strict=True)
    ]
    layer.ledger = replace(layer.ledger, whole=whole, coded=tuple(coded))


def _above(whole: Labels, coded: Sequence[Labels], values: Tensor) -> Tensor:
    """Scores above all of a ledger, by the norms of values [kv_heads, tokens, dim]; float32 [kv_heads * tokens]."""
    top = max((float(labels.score.max()) for labels in (whole, *coded) if len(labels.score)), default=0.0)
    norms = values.float().norm(dim=-1).flatten().cpu()
    return top + ABOVE * (abs(top) or 1.0) * (1 + norms / norms.max().clamp(min=1e-20))


def _together(sources: Sequence[Source], shape: LayerShape) -> list[Source]:
    """The targets of a layer, where entries whose codes depend on each other stay together or leave together."""
    result = []
    for source in sources:
        rung = shape.tiers[source.tier - 1] if source.tier else None
        if rung is not None and rung.group:
            key = part_key(source.row, source.prompt)
            torn = torch.isin(key, key[source.targets != STAYS]) & (source.targets == STAYS)
            source = source.with_targets(source.targets.masked_fill(torn, shape.nearest(rung)))
        result.append(source)
    return result
