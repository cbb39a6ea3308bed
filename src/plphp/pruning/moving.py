# SPDX-License-Identifier: Apache-2.0
"""Moving the entries of a layer down its rungs, each to the target that a plan has for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from plphp.kernels.books import LayerBooks
from plphp.kernels.codecs import Codes, stored
from plphp.kernels.coded import CodedKV, Reading, Tier
from plphp.kernels.coder import Means, with_rest
from plphp.kernels.precision import as_written
from plphp.kernels.prompt_codes import PromptCodes
from plphp.kernels.regrouping import Moving, decoded_entries, taken, tier_of
from plphp.kernels.rungs import Rung

from .entries import LayerEntries
from .fading_plan import STAYS
from .ledger import Labels, LayerLedger
from .sources import ROWS, Source, part_key


class Move:
    """Entries of a layer that move, each to its target; nothing is left of those that are dropped.

    Parameters
    ----------
    layer : LayerEntries
        Its prefix has a stored row of its own for every row of the batch, and so have its codes for every part.
    codes : PromptCodes, optional
        What it holds in few bits.
    sources : sequence of Source
        The prefix, and each tier of the codes.
    rungs : sequence of Rung
        What targets name, from 1.
    books : LayerBooks, optional
        Codebooks of the layer, where a rung needs them.
    reading : Reading
        What a step reads of a prompt that had no codes.
    """

    def __init__(
        self,
        layer: LayerEntries,
        codes: PromptCodes | None,
        sources: Sequence[Source],
        rungs: Sequence[Rung],
        books: LayerBooks | None,
        reading: Reading,
    ) -> None:
        assert layer.prefix is not None
        assert layer.ledger is not None
        self.layer, self.codes, self.sources, self.reading = layer, codes, sources, reading
        self.prefix, self.ledger = layer.prefix, layer.ledger
        self.rungs = dict(enumerate(rungs, 1))
        own = None if codes is None else codes.block.books
        self.books = own if books is None else books.to(self.prefix.device)
        self.dtype = torch.promote_types(self.prefix.keys.dtype, torch.float32)
        self.heads, self.batch = self.prefix.kv_heads, self.prefix.batch
        # Parts that were there come first, in their order.
        coded = torch.cat([_key(source)[source.coded] for source in sources]).unique()
        before = self._old_keys()
        kept = before[torch.isin(before, coded)]
        self.parts = torch.cat([kept, coded[~torch.isin(coded, kept)]])

    def run(self) -> None:
        """Change the layer."""
        whole = self.sources[0]
        codes: PromptCodes | None = None
        labels: tuple[Labels, ...] = ()
        if len(self.parts):
            with as_written(self.prefix.device):
                codes, labels = self._coded()
        stays = (whole.targets == STAYS).nonzero()[:, 0]
        if len(stays) < len(whole.targets):
            pair = (whole.row * self.heads + whole.head)[stays]
            self.layer.prefix = self.prefix.of_entries(stays, pair, self.batch)
            whole_labels = whole.labels.of_entries(stays, pair, self.batch)
        else:
            whole_labels = whole.labels
        self.layer.coded = () if codes is None else (codes,)
        self.layer.ledger = LayerLedger(whole_labels, labels, self.ledger.weights)

    def _coded(self) -> tuple[PromptCodes, tuple[Labels, ...]]:
        asked = [self.rungs[n] for n in self.rungs if any(bool((own.targets == n).any()) for own in self.sources)]
        staying = [self._tier(own).rung for own in self.sources[1:] if bool((own.targets == STAYS).any())]
        rungs = list(dict.fromkeys([*staying, *asked]))
        means = self._means(rungs)
        made = [self._one_tier(rung, means) for rung in rungs]
        before = () if self.codes is None else self.codes.block.reading
        readings = dict(zip(self._old_keys().tolist(), before, strict=True))
        reading = tuple(readings.get(part, self.reading) for part in self.parts.tolist())
        books = self.books if any(rung.needs_books for rung in rungs) else None
        block = with_rest(CodedKV(tuple(tier for tier, _ in made), *means, books, reading))
        owners, prompts = (self.parts // ROWS).tolist(), (self.parts % ROWS).tolist()
        return PromptCodes(block, tuple(owners), tuple(prompts), self.batch), tuple(labels for _, labels in made)

    def _one_tier(self, rung: Rung, means: Means) -> tuple[Tier, Labels]:
        """The entries of a rung: what stays in it, and what comes to it."""
        own = next((source for source in self.sources[1:] if self._tier(source).rung == rung), None)
        if rung.group:
            assert own is not None  # nothing comes to such a rung
            return self._whole_parts(own)
        pieces, labels = [], []
        for source in self.sources:
            if source is own:
                entries = (source.targets == STAYS).nonzero()[:, 0]
                if len(entries):
                    pieces.append(self._moving(source, entries, *taken(self._tier(source), entries)))
                    labels.append((source, entries))
            entries = self._coming(source, rung)
            if len(entries):
                pieces.append(self._moving(source, entries, *self._states(source, entries)))
                labels.append((source, entries))
        tier, order = tier_of(rung, pieces, len(self.parts), self.heads, means, self.books)
        position = torch.cat([source.labels.position[entries] for source, entries in labels])[order]
        score = torch.cat([source.labels.score[entries] for source, entries in labels])[order]
        return tier, Labels.of(position, score, tier.counts)

    def _coming(self, source: Source, rung: Rung) -> Tensor:
        """The entries of a place that go down to a rung."""
        number = next((number for number, other in self.rungs.items() if other == rung), 0)
        return (source.targets == number).nonzero()[:, 0] if number else torch.zeros(0, dtype=torch.int64)

    def _whole_parts(self, source: Source) -> tuple[Tier, Labels]:
        """A tier whose codes depend on each other: of every part all of it stays, or nothing."""
        stays = (_key(source)[source.targets == STAYS]).unique()
        old = self._old_keys()
        live = [number for number, key in enumerate(old.tolist()) if bool((stays == key).any())]
        tier = self._tier(source).of_rows(live, tuple(range(len(live))))
        labels = source.labels.select(live)
        counts = {int(old[number]): self._tier(source).counts[number] for number in live}
        every = tuple(counts.get(part, (0,) * self.heads) for part in self.parts.tolist())
        rows = tuple(range(len(self.parts)))
        return Tier(tier.rung, tier.keys, tier.values, every, rows), Labels.of(labels.position, labels.score, every)

    def _moving(self, source: Source, entries: Tensor, keys: Tensor | Codes, values: Tensor | Codes) -> Moving:
        pair = self._part(_key(source)[entries]) * self.heads + source.head[entries]
        return Moving(pair, source.labels.position[entries], keys, values)

    def _states(self, source: Source, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some entries, or what their codes stand for."""
        if source.tier == 0:
            own = entries.to(self.prefix.device)
            return self.prefix.keys[own].to(self.dtype), self.prefix.values[own].to(self.dtype)
        assert self.codes is not None
        return decoded_entries(self._tier(source), entries, self.codes.block.means, self.codes.block.books, self.dtype)

    def _means(self, rungs: Iterable[Rung]) -> Means:
        """The means of all parts: as they were, or of all that is held of their prompts."""
        if not any(rung.keys.centred or rung.values.centred for rung in rungs):
            return None, None
        old = self._old_keys()
        known = torch.zeros(len(old), dtype=torch.bool)
        for source in self.sources[1:]:
            if not self._tier(source).rung.group:
                known |= torch.tensor([any(counts) for counts in self._tier(source).counts])
        keys, values = self._computed(old[known])
        if bool(known.any()) and self.codes is not None:
            heads = torch.arange(self.heads)
            there = torch.isin(self.parts, old[known])
            to = (there.nonzero() * self.heads + heads).flatten()
            at = {int(key): number for number, key in enumerate(old.tolist())}
            rows = torch.tensor([at[key] for key in self.parts[there].tolist()], dtype=torch.int64)
            of = (rows[:, None] * self.heads + heads).flatten()
            for new, mean in zip((keys, values), self.codes.block.means, strict=True):
                if mean is not None:
                    new[to.to(new.device)] = mean[of.to(new.device)]
        return keys, values

    def _computed(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """Means of parts over what is held of their vision entries, 0 for those that are known."""
        dims = self.prefix.keys.shape[1], self.prefix.values.shape[1]
        pairs, device = len(self.parts) * self.heads, self.prefix.device
        sums = [torch.zeros(pairs, dim, dtype=self.dtype, device=device) for dim in dims]
        counts = torch.zeros(pairs, 1, dtype=self.dtype, device=device)
        for source in self.sources:
            key = _key(source)
            wanted = torch.isin(key, self.parts) & ~torch.isin(key, known) & source.vision
            entries = wanted.nonzero()[:, 0]
            if not len(entries):
                continue
            states = self._states(source, entries)
            pair = (self._part(key[entries]) * self.heads + source.head[entries]).to(device)
            for total, own in zip(sums, states, strict=True):
                total.index_add_(0, pair, own)
            counts.index_add_(0, pair, torch.ones(len(entries), 1, dtype=self.dtype, device=device))
        keys, values = (stored(total / counts.clamp(min=1)) for total in sums)
        return keys, values

    def _part(self, key: Tensor) -> Tensor:
        """The number of the part of each key, int64."""
        ordered, number = self.parts.sort()
        return number[torch.searchsorted(ordered, key)]

    def _old_keys(self) -> Tensor:
        if self.codes is None:
            return torch.zeros(0, dtype=torch.int64)
        return part_key(torch.tensor(self.codes.owners), torch.tensor(self.codes.prompts))

    def _tier(self, source: Source) -> Tier:
        assert self.codes is not None
        return self.codes.block.tiers[source.tier - 1]


def _key(source: Source) -> Tensor:
    return part_key(source.row, source.prompt)
