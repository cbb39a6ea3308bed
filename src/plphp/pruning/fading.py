# SPDX-License-Identifier: Apache-2.0
"""Old images fade: the vision entries of a cache are brought below a budget, all layers and rows together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plphp.errors import CacheStateError, ConfigError
from plphp.kernels.books import LayerBooks
from plphp.kernels.coded import Reading
from plphp.policy.bank import QueryBank
from plphp.policy.chain import Link
from plphp.policy.fading_ladders import PLAIN, PRODUCT
from plphp.policy.fading_rules import RULES, HeldEntries, Rule
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.vision_budget import VisionBudget

from .coders import fading_books
from .entries import LayerEntries
from .fading_plan import DROPPED, STAYS, LayerShape, RowEntries, fitted
from .image_table import ImageTable
from .ledger import codes_of
from .moving import Move
from .sources import Source, part_key, sources_of, unshare, whole_source


@dataclass(frozen=True)
class Fading:
    """How the images of a cache fade.

    Parameters
    ----------
    budget : VisionBudget
        How much all that is held of them may take.
    rule : Rule
        Which entries go first.
    books : mapping of int to LayerBooks, optional
        Codebooks by decoder layer.
    reading : Reading
        What a step reads of entries in few bits.
    safeguard : float
        Share of its equal part that each KV head keeps, see `HeldEntries`.
    on_host : bool
        Whether whole images wait in host memory.
    """

    budget: VisionBudget
    rule: Rule
    books: Mapping[int, LayerBooks] | None
    reading: Reading
    safeguard: float
    on_host: bool = False

    @classmethod
    def of(cls, link: Link[KVStage], own_bank: QueryBank | None = None) -> Fading | None:
        """What a config asks for; None without a budget."""
        config = link.config
        if config.vision_budget is None:
            return None
        return cls(
            VisionBudget.parse(config.vision_budget),
            RULES[config.fading],
            fading_books(link, own_bank),
            Reading(config.read, config.rest),
            config.head_safeguard if link.stage.fades_ragged(config) else 1.0,
            config.tier_device is not None,
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Fading:
        return self  # nothing in it changes, and codebooks belong to the model

    def budget_of(self, layers: Mapping[int, LayerEntries]) -> int:
        """The budget in bytes, for layers that have read something."""
        return self.budget.bytes_of(sum(layer.entry_nbytes for layer in layers.values()))

    def books_of(self, number: int) -> LayerBooks | None:
        """Codebooks of a layer."""
        return None if self.books is None else self.books.get(number)

    def shape_of(self, number: int, layer: LayerEntries) -> LayerShape:
        """What the entries of a layer are like.

        Raises
        ------
        UnsupportedFeatureError, ConfigError
            If the rungs cannot hold them, or codebooks are of another model.
        """
        books = self.books_of(number)
        codes = codes_of(layer.coded)
        tiers = () if codes is None else tuple(tier.rung for tier in codes.block.tiers)
        family = PLAIN if books is None else PRODUCT
        shape = LayerShape(family, self.reading, layer.dims, layer.pair_nbytes, tiers)
        for rung in shape.rungs:
            rung.check(*layer.dims, books)
        if books is not None and layer.prefix is not None:
            books.check(layer.prefix.kv_heads, *layer.dims)
        return shape


def fading_as(config: PLPHPConfig, source: PLPHPConfig) -> PLPHPConfig:
    """Settings under which images fade as they do under others."""
    return replace(
        config,
        vision_budget=source.vision_budget,
        fading=source.fading,
        tier_device=source.tier_device,
        books=source.books if source.vision_budget else config.books,
    )


def vision_nbytes(layer: LayerEntries, images: ImageTable) -> int:
    """Bytes of the vision entries that a layer holds: whole ones, codes, scales and means."""
    if layer.ledger is None:
        return 0
    whole = whole_source(layer, images)
    return int(whole.vision.sum()) * layer.pair_nbytes + sum(block.nbytes for block in layer.coded)


def fade(layers: Mapping[int, LayerEntries], images: ImageTable, fading: Fading) -> bool:
    """Bring the vision entries of all layers below the budget.

    Parameters
    ----------
    layers : mapping of int to LayerEntries
        The layers with a ledger, by number; those without have read nothing yet.
    images : ImageTable
        The images of the conversation.
    fading : Fading
        The budget, and how.

    Returns
    -------
    bool
        Whether anything had to go.

    Raises
    ------
    ConfigError
        If the budget is too small: in the first turn for some row or layer, later for all of them.
    UnsupportedFeatureError
        If entries cannot be held in few bits. Some layers have changed by then.
    """
    layers = {number: layer for number, layer in layers.items() if layer.ledger is not None}
    budget = fading.budget_of(layers)
    if sum(vision_nbytes(layer, images) for layer in layers.values()) <= budget:
        return False
    shapes = {number: fading.shape_of(number, layer) for number, layer in layers.items()}
    weights = {
        number: [own * images.live_share(row) for row, own in enumerate(layer.ledger.weights)]
        for number, layer in layers.items()
        if layer.ledger is not None
    }
    total = sum(map(sum, weights.values()))
    _refuse_too_small(budget, total, layers, shapes, weights, first=images.turns < 2)
    for number, layer in layers.items():
        budgets = [budget * weight / total for weight in weights[number]]
        unshare(layer)
        sources = _codable(layer, _planned(sources_of(layer, images), images, shapes[number], budgets, fading))
        if any(bool((source.targets != STAYS).any()) for source in sources):
            books = fading.books_of(number)
            Move(layer, codes_of(layer.coded), sources, shapes[number].rungs, books, fading.reading).run()
    held = sum(vision_nbytes(layer, images) for layer in layers.values())
    if held > budget:
        raise CacheStateError(f"The vision entries take {held} bytes after they have faded, above {budget}.")
    return True


def _planned(
    sources: Sequence[Source], images: ImageTable, shape: LayerShape, budgets: Sequence[float], fading: Fading
) -> list[Source]:
    """The entries of a layer with their targets, row by row."""
    targets = [source.targets.clone() for source in sources]
    for row, budget in enumerate(budgets):
        own = [(source.vision & (source.row == row)).nonzero()[:, 0] for source in sources]
        if not any(map(len, own)):
            continue
        order = torch.cat([source.labels.position[some] for source, some in zip(sources, own, strict=True)]).argsort(
            stable=True
        )
        entries = _row_entries(sources, own, order, images, row, fading)
        planned = torch.empty_like(order)
        planned[order] = fitted(entries, shape, fading.rule, budget)
        for target, some, part in zip(targets, own, planned.split([len(some) for some in own]), strict=True):
            target[some] = part
    return [source.with_targets(target) for source, target in zip(sources, targets, strict=True)]


def _codable(layer: LayerEntries, sources: list[Source]) -> list[Source]:
    """The same, where of a prompt with NaN or inf nothing goes to few bits: it leaves.

    Such a row was not ranked, and an error would end the others with it.
    """
    assert layer.prefix is not None
    whole, states = sources[0], (layer.prefix.keys, layer.prefix.values)
    damaged = torch.stack([~own.isfinite().all(1) for own in states]).any(0).cpu() & whole.vision
    if not bool(damaged.any()):
        return sources
    parts = part_key(whole.row, whole.prompt)[damaged].unique()
    result = []
    for source in sources:
        gone = (source.targets > 0) & torch.isin(part_key(source.row, source.prompt), parts)
        result.append(source.with_targets(source.targets.masked_fill(gone, DROPPED)))
    return result


def _row_entries(
    sources: Sequence[Source], own: Sequence[Tensor], order: Tensor, images: ImageTable, row: int, fading: Fading
) -> RowEntries:
    """The vision entries of a row by their positions."""

    def column(name: str) -> Tensor:
        return torch.cat([getattr(source, name)[some] for source, some in zip(sources, own, strict=True)])[order]

    ages = torch.tensor(images.ages(row))[column("image")]
    places = column("image").unique()
    image = ages.unique(return_inverse=True)[1]
    score = torch.cat([source.labels.score[some] for source, some in zip(sources, own, strict=True)])[order]
    heads = sources[0].labels.block.kv_heads
    held = HeldEntries(score, column("head"), image, heads, len(places), fading.safeguard)
    tokens = sum(len(images.rows[row][place].positions) for place in places.tolist())
    tier = torch.cat([torch.full_like(some, source.tier) for source, some in zip(sources, own, strict=True)])[order]
    return RowEntries(held, tier, column("prompt"), tokens)


def _refuse_too_small(
    budget: int,
    total: float,
    layers: Mapping[int, LayerEntries],
    shapes: Mapping[int, LayerShape],
    weights: Mapping[int, Sequence[float]],
    *,
    first: bool,
) -> None:
    """Raise `ConfigError` where a part of the budget holds not one entry of each KV head.

    Of the first turn with images any part counts. In later ones rows without new images have less of the budget than
    they had, and may come to hold nothing: then an error says that no part holds anything.
    """
    parts: list[float] = []
    for number, layer in layers.items():
        heads = 1 if layer.prefix is None else layer.prefix.kv_heads
        needed = heads * shapes[number].least_nbytes + shapes[number].part_nbytes(heads)
        parts += [needed * total / weight for weight in weights[number] if weight]
    least = (max if first else min)(parts, default=0.0)
    if budget < least:
        raise ConfigError(
            f"a vision_budget of {budget} bytes has no room for one vision entry of every layer and KV head: give at "
            f"least {math.ceil(least)} bytes for these rows"
        )
