# SPDX-License-Identifier: Apache-2.0
"""What is held of each image of a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.kernels.coded_bytes import means_there, tier_nbytes
from plphp.settings.ladder import WHOLE

from .entries import LayerEntries
from .image_table import ImageTable
from .ledger import codes_of
from .report_checks import check_numbers
from .sources import sources_of

NUMBERS = ("number", "row", "turn", "first", "last", "tokens", "whole_bytes", "nbytes", "vision_kept", "attention")
FADED, ASKED = 0.1, 0.65
"""An image is wanted back that is held in less than this part of its bytes, and that an answer turns to at least so
far, see `plphp.pruning.asked_images.AskedImages`."""


@dataclass(frozen=True)
class ImageMemory:
    """What a cache holds of an image, a tile or a video.

    Parameters
    ----------
    number : int
        By which `plphp.PrunedCache.forget` and ``restore`` know it. Images are numbered turn after turn, and of a turn
        row after row; where rows of the cache are chosen or repeated, they are numbered anew.
    row : int
        Row of the batch.
    turn : int
        Turn of the conversation that brought it, from 1.
    first, last : int
        Logical positions of its first and its last vision token.
    tokens : int
        Its vision tokens.
    grid : tuple of int, optional
        ``(frames, height, width)`` in tokens, where they form a grid.
    forgotten : bool
        Whether it was forgotten, and not restored since.
    entries : dict of str to int
        By the name of a rung, ``whole`` for the dtype of the model, how many entries are held in it, over the pruned
        layers and their KV heads.
    nbytes : int
        Their bytes, with the image's part of scales and means. What rows share counts for each of them.
    whole_bytes : int
        Bytes of all of its entries, held whole.
    vision_kept : float
        Entries held as a fraction of all.
    attention : float
        How far the newest answer turns to it in its first tokens, from 0 to 1: see
        `plphp.pruning.asked_images.AskedImages`. 0 where that was not looked at: in answers of fewer than three tokens,
        with beams, and in steps that are replayed from a CUDA graph.
    """

    number: int
    row: int
    turn: int
    first: int
    last: int
    tokens: int
    grid: tuple[int, int, int] | None
    forgotten: bool
    entries: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0
    whole_bytes: int = 0
    vision_kept: float = 0.0
    attention: float = 0.0

    @property
    def held(self) -> float:
        """Its bytes as a fraction of those of all of its entries held whole."""
        return self.nbytes / self.whole_bytes if self.whole_bytes else 0.0

    @property
    def wanted(self) -> bool:
        """Whether the newest answer turns to it though it has faded most of the way: restore it and ask again."""
        return self.attention >= ASKED and 0 < self.held < FADED

    def values(self) -> dict[str, Any]:
        """Return it ready for JSON, with `held` and `wanted`."""
        return {**dataclasses.asdict(self), "held": self.held, "wanted": self.wanted}

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ImageMemory:
        """Read it from a report; raises TypeError for what is none."""
        grid = values.get("grid")
        image = cls(**{**values, "grid": tuple(grid) if grid else None})
        check_numbers(image, NUMBERS)
        return image


def image_memories(layers: Mapping[int, LayerEntries], images: ImageTable) -> list[ImageMemory]:
    """What layers hold of each image, by number."""
    numbered = images.numbered()
    most = max(1, *(len(own) for own in images.rows), 1)
    number_of = torch.full((len(images.rows), most), -1)
    for number, (row, place) in enumerate(numbered):
        number_of[row, place] = number
    entries: dict[str, Tensor] = {}
    nbytes = torch.zeros(len(numbered), dtype=torch.float64)
    held = [layer for layer in layers.values() if layer.ledger is not None]
    for layer in held:
        for name, own, weight in _counted(layer, images, number_of):
            counts = torch.bincount(own, minlength=len(numbered))
            entries[name] = entries.get(name, torch.zeros_like(counts)) + counts
            nbytes += torch.bincount(own, weights=weight, minlength=len(numbered))
    pairs = sum(layer.prefix.kv_heads for layer in held if layer.prefix is not None)
    per_token = sum(layer.entry_nbytes for layer in held)
    result = []
    for number, (row, place) in enumerate(numbered):
        image = images.rows[row][place]
        of_image = {name: int(counts[number]) for name, counts in entries.items() if counts[number]}
        tokens = len(image.positions)
        result.append(
            ImageMemory(
                number,
                row,
                image.turn,
                image.first,
                image.last,
                tokens,
                image.grid,
                image.forgotten,
                of_image,
                round(float(nbytes[number])),
                tokens * per_token,
                sum(of_image.values()) / (tokens * pairs) if pairs else 0.0,
                image.attention,
            )
        )
    return result


def _counted(layer: LayerEntries, images: ImageTable, number_of: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """By rung, the number of the image of each vision entry of a layer, and the bytes that the entry counts for."""
    whole, *tiers = sources_of(layer, images, shared=False)
    codes, result = codes_of(layer.coded), []
    number = number_of[whole.row, whole.image][whole.vision]
    result.append((WHOLE, number, torch.full(number.shape, float(layer.pair_nbytes), dtype=torch.float64)))
    for source in tiers:
        assert codes is not None
        block, tier = codes.block, codes.block.tiers[source.tier - 1]
        means = means_there(block)
        of_parts = []
        for stored in block.rows:
            count, total = sum(tier.counts[stored]), sum(block.held[stored])
            each = tier_nbytes(tier, stored) / max(1, count) + means / max(1, total)
            of_parts += [each] * count
        weight = torch.tensor(of_parts, dtype=torch.float64)
        result.append((tier.rung.name, number_of[source.row, source.image], weight))
    return result
