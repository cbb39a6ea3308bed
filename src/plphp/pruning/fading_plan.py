# SPDX-License-Identifier: Apache-2.0
"""What becomes of the vision entries of one row in one layer, so that they fit their part of the budget.

An entry stays in its rung, goes down to another, or is dropped; none goes up. The order of the entries is that of a
rule (`plphp.policy.fading_rules`), the rungs are those of a family of ladders (`plphp.policy.fading_ladders`), and the
level of the family is the highest whose bytes fit, means and scales counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plphp.kernels.coded import Reading
from plphp.kernels.coded_bytes import head_nbytes, means_of_shape
from plphp.kernels.rungs import RUNGS, Rung
from plphp.policy.fading_ladders import LadderFamily
from plphp.policy.fading_rules import HeldEntries, Rule
from plphp.settings.ladder import WHOLE

STAYS, DROPPED = -2, -1
"""Targets of entries beside the numbers of rungs of the family, from 1: 0 is ``whole``, to which none goes up."""
STEPS, SMALLER = 40, 0.98
"""Halvings of the range of levels; by how much a level shrinks whose bytes turn out to be too many."""


@dataclass(frozen=True)
class LayerShape:
    """What the entries of a layer are like.

    Parameters
    ----------
    family : LadderFamily
        Down which entries fade.
    reading : Reading
        What a step reads of entries in few bits.
    dims : tuple of int
        Channels of keys and of values.
    pair_nbytes : int
        Bytes of the key and the value of a token in a KV head, held whole.
    tiers : tuple of Rung
        Rungs in which the layer holds entries now.
    """

    family: LadderFamily
    reading: Reading
    dims: tuple[int, int]
    pair_nbytes: int
    tiers: tuple[Rung, ...]

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """Rungs of few bits of the family, the best first."""
        return tuple(RUNGS[name] for name in self.family.rungs if name != WHOLE)

    def nbytes(self, rung: Rung, entries: int = 1) -> int:
        """Bytes of entries of a KV head in a rung."""
        return head_nbytes(rung, entries, *self.dims)

    def part_nbytes(self, heads: int) -> int:
        """Bytes of the means of a prompt in a row."""
        return heads * means_of_shape(self.rungs, self.reading, *self.dims)

    @property
    def least_nbytes(self) -> int:
        """Bytes of an entry in the lowest rung."""
        return self.nbytes(self.rungs[-1])

    def nearest(self, rung: Rung) -> int:
        """The rung of the family that takes entries of a rung whose codes depend on each other: the lowest that has at
        least as many bits, else the best."""
        bits = rung.bits(*self.dims)
        enough = [number for number, own in enumerate(self.rungs, 1) if own.bits(*self.dims) >= bits]
        return max(enough, default=1)

    def target(self, source: int, asked: int, graded: bool) -> int:
        """What becomes of an entry that a ladder asks for in rung ``asked`` of the family, 0 for whole.

        Parameters
        ----------
        source : int
            0 for an entry that is whole, from 1 the number of its tier.
        asked : int
        graded : bool
            Whether entries fade from rung to rung at all.
        """
        if not graded or (source == 0 and asked == 0):
            return STAYS
        if source == 0:
            return asked
        own = self.tiers[source - 1]
        at_most = self.nearest(own) if own.group else 0
        if asked and self.rungs[asked - 1].bits(*self.dims) < own.bits(*self.dims):
            return max(asked, at_most)
        return at_most or STAYS


@dataclass(frozen=True)
class RowEntries:
    """The vision entries of one row in one layer.

    Parameters
    ----------
    held : HeldEntries
        By which they are put in order.
    source : Tensor
        int64 [entries]; 0 for whole ones, from 1 the number of the tier.
    prompt : Tensor
        int64 [entries]; logical position at which the prompt of each begins.
    tokens : int
        Vision tokens of the images that they are of.
    """

    held: HeldEntries
    source: Tensor
    prompt: Tensor
    tokens: int


def fitted(entries: RowEntries, shape: LayerShape, rule: Rule, budget: float) -> Tensor:
    """What becomes of each entry, so that all of them take at most ``budget`` bytes.

    Returns
    -------
    Tensor
        int64 [entries]; `STAYS`, `DROPPED`, or the number of a rung of the family.
    """
    stay = torch.full_like(entries.source, STAYS)
    if nbytes_of(entries, stay, shape) <= budget:
        return stay
    plan = _Plan(entries, shape, rule)
    low, high = 0.0, float(shape.family.top)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if plan.nbytes(middle) <= budget else (low, middle)
    # What parts of prompts share was estimated.
    while nbytes_of(entries, targets := settled(entries, plan.targets(low), shape), shape) > budget:
        low *= SMALLER
        if low < 1e-6:
            return torch.full_like(stay, DROPPED)
    return targets


def settled(entries: RowEntries, targets: Tensor, shape: LayerShape) -> Tensor:
    """The targets, where entries whose codes depend on each other stay together or leave their tier together."""
    targets = targets.clone()
    for number, rung in enumerate(shape.tiers, 1):
        own = entries.source == number
        if not rung.group or not bool(own.any()):
            continue
        left = entries.prompt[own & (targets != STAYS)].unique()
        torn = own & (targets == STAYS) & torch.isin(entries.prompt, left)
        targets[torn] = shape.nearest(rung)
    return targets


def nbytes_of(entries: RowEntries, targets: Tensor, shape: LayerShape) -> int:
    """Bytes that the entries take with some targets, means of prompts counted wherever a prompt has codes."""
    stays = targets == STAYS
    total = int((stays & (entries.source == 0)).sum()) * shape.pair_nbytes
    coded = (targets > 0) | (stays & (entries.source > 0))
    for number, rung in enumerate(shape.rungs, 1):
        total += int((targets == number).sum()) * shape.nbytes(rung)
    for number, rung in enumerate(shape.tiers, 1):
        own = stays & (entries.source == number)
        if not rung.group:
            total += int(own.sum()) * shape.nbytes(rung)
            continue
        pairs = entries.prompt[own] * entries.held.heads + entries.held.head[own]
        total += sum(shape.nbytes(rung, count) for count in pairs.unique(return_counts=True)[1].tolist())
    return total + len(entries.prompt[coded].unique()) * shape.part_nbytes(entries.held.heads)


class _Plan:
    """The targets of a row by the level of the family, and about how many bytes they take."""

    def __init__(self, entries: RowEntries, shape: LayerShape, rule: Rule) -> None:
        self._entries, self._shape, self._rule = entries, shape, rule
        self._places = rule.order(entries.held)
        levels, sources = len(shape.family.rungs), 1 + len(shape.tiers)
        table = [[shape.target(source, asked, rule.graded) for asked in range(levels)] for source in range(sources)]
        self._table = torch.tensor([[*row, DROPPED] for row in table])
        of_source = [entries.source == source for source in range(sources)]
        self._sorted = [np.sort(self._places[own].numpy()) for own in of_source]
        self._nbytes = [[self._of_entry(source, target) for target in row] for source, row in enumerate(table)]
        prompts, number = entries.prompt.unique(return_inverse=True)
        first = torch.full((len(prompts),), torch.inf, dtype=torch.float64)
        self._first = np.sort(first.scatter_reduce_(0, number, self._places, "amin").numpy())

    def bounds(self, level: float) -> list[float]:
        """Places per head down to which entries are held in each rung of the family or in a better one."""
        if not self._rule.graded:
            return [self._entries.tokens * level / self._shape.family.top] * len(self._shape.family.rungs)
        return [share * self._entries.tokens for share in self._shape.family.cumulative(level)]

    def nbytes(self, level: float) -> float:
        """About how many bytes are held at a level."""
        bounds = self.bounds(level)
        total = float(np.searchsorted(self._first, bounds[-1])) * self._shape.part_nbytes(self._entries.held.heads)
        for places, nbytes in zip(self._sorted, self._nbytes, strict=True):
            held = np.maximum.accumulate(np.searchsorted(places, bounds))
            total += float(np.dot(np.diff(held, prepend=0), nbytes))
        return total

    def targets(self, level: float) -> Tensor:
        """The targets at a level, int64 [entries]."""
        bounds = torch.tensor(self.bounds(level), dtype=torch.float64).cummax(0).values
        asked = torch.searchsorted(bounds, self._places, right=True)
        return self._table[self._entries.source, asked]

    def _of_entry(self, source: int, target: int) -> float:
        shape = self._shape
        if target > 0:
            return shape.nbytes(shape.rungs[target - 1])
        if source == 0:
            return shape.pair_nbytes
        rung, full = shape.tiers[source - 1], max(1, shape.tiers[source - 1].group)
        return shape.nbytes(rung, full) / full
