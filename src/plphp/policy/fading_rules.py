# SPDX-License-Identifier: Apache-2.0
"""Rules by which the vision entries of a layer fade when they take more than their budget. Pure functions.

A rule puts the entries of one row in an order: for each the least number of *places per KV head* at which it is held.
With k places a head, the entries below k are held, in the rungs that a family of ladders has for that k
(`plphp.policy.fading_ladders`). So what is held of a smaller budget is held of a larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 0.5
"""Share of all places that the rule ``ranked`` deals out to the images in equal parts."""


@dataclass(frozen=True)
class HeldEntries:
    """The vision entries that a layer holds of a row.

    Parameters
    ----------
    score : Tensor
        float [entries]; higher is better.
    head, image : Tensor
        int64 [entries]; KV head, and image from the oldest, of those of which anything is held.
    heads, images : int
        How many there are.
    safeguard : float
        Share of its equal part that each head keeps in any case, in [0, 1]; 1 where all heads keep as many.
    """

    score: Tensor
    head: Tensor
    image: Tensor
    heads: int
    images: int
    safeguard: float

    @cached_property
    def best_first(self) -> Tensor:
        """The entries from the highest score, of equals the earlier first; int64 [entries]."""
        return self.score.argsort(descending=True, stable=True)


Order: TypeAlias = "Callable[[HeldEntries], Tensor]"
"""The places per head at which each entry is held, float64 [entries]; inf for never."""


@dataclass(frozen=True)
class Rule:
    """A rule.

    Parameters
    ----------
    order : callable
        Which entries go first.
    graded : bool
        Whether entries fade from rung to rung; otherwise they are held as they are, or dropped.
    """

    order: Order
    graded: bool = True


def ranked(held: HeldEntries) -> Tensor:
    """Half of the places go to the images in equal parts, to the best entries of each; the rest to the best of all.

    Within both halves every head has its safeguard, as in `plphp.policy.selection.keep_masks`.
    """
    import torch

    of_images = held.images / FLOOR * _within(held, held.image, held.images)
    of_all = _within(held, torch.zeros_like(held.image), 1) / (1 - FLOOR)
    return _places(held, torch.minimum(of_images, of_all))


def equal(held: HeldEntries) -> Tensor:
    """Every image has an equal part of all places, ranked within the image; what it does not fill goes to the rest."""
    return _places(held, held.images * _within(held, held.image, held.images))


def newest(held: HeldEntries) -> Tensor:
    """Only the newest image is held."""
    import torch

    old = held.image < held.images - 1
    return _places(held, _within(held, held.image, held.images).masked_fill(old, torch.inf))


def oldest(held: HeldEntries) -> Tensor:
    """Images leave as a whole, the oldest first; of the newest alone a part may be held."""
    import torch

    age = held.images - 1 - held.image
    places = _places(held, _within(held, held.image, held.images) + age * (len(held.score) + 1.0))
    last = torch.zeros(held.images, dtype=places.dtype).scatter_reduce_(0, held.image, places, "amax")
    return torch.where(age == 0, places, last[held.image])


RULES: dict[str, Rule] = {
    "ranked": Rule(ranked),
    "oldest": Rule(oldest, graded=False),
    "newest": Rule(newest),
    "equal": Rule(equal),
}
"""By the setting ``fading``."""


def _within(held: HeldEntries, group: Tensor, groups: int) -> Tensor:
    """The places per head of a group at which each of its entries is held, if the group had them for itself."""
    import torch

    own = held.safeguard
    places = torch.full(held.score.shape, torch.inf, dtype=torch.float64)
    if own > 0:
        places = (_position(held.best_first, group * held.heads + held.head, groups * held.heads) + 1) / own
    if own == 1:
        return places
    shared = (_position(held.best_first, group, groups) + 1) / ((1 - own) * held.heads)
    # Some entries have a place by both: the next move up.
    return (_position(_sorted(torch.minimum(places, shared), held), group, groups) + 1) / held.heads


def _places(held: HeldEntries, key: Tensor) -> Tensor:
    """From a key to the places per head, which are filled by the entries with the smallest keys, the best of equals
    first."""
    import torch

    order = _sorted(key, held)
    if held.safeguard == 1:
        places = _position(order, held.head, held.heads)
    else:
        places = _position(order, torch.zeros_like(held.head), 1) / held.heads
    return torch.where(key.isfinite(), places, torch.inf)


def _sorted(key: Tensor, held: HeldEntries) -> Tensor:
    """The entries from the smallest key, the best of equals first; int64 [entries]."""
    return held.best_first[key[held.best_first].argsort(stable=True)]


def _position(order: Tensor, group: Tensor, groups: int) -> Tensor:
    """The position of each entry among those of its group, in an order of all; from 0, float64 [entries]."""
    import numpy as np
    import torch

    if groups > 1:
        # Few groups are sorted by their digits.
        numbers = group[order].numpy().astype(np.min_scalar_type(groups))
        order = order[torch.from_numpy(numbers.argsort(kind="stable"))]
    counts = torch.bincount(group, minlength=groups)
    starts = counts.cumsum(0) - counts
    position = torch.empty(len(order), dtype=torch.float64)
    position[order] = torch.arange(len(order), dtype=torch.float64) - starts[group[order]]
    return position
