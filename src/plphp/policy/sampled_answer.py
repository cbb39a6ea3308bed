# SPDX-License-Identifier: Apache-2.0
"""What a sample took of one answer: enough to let another sample, which stands where this one stood, take the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.errors import ConfigError

from .bank import LayerBank, QueryBank
from .entry_sampling import Entries, EntrySample
from .rotation import Rotation

PLACE = "answer"
"""Where the record of a file has the place of its answer among all answers."""


@dataclass(frozen=True)
class SampledAnswer:
    """What `plphp.policy.bank_sampling.BankSample.add` took of an answer.

    Parameters
    ----------
    number : int
        Of the answer among those that the sample took, from 1 on.
    before : int
        Tokens of the answers before it.
    tokens : int
        Tokens of the answer that have a query.
    ahead : Tensor
        int64 [kept], ascending; those of them that came into the sample, by their numbers in the answer.
    queries : mapping of int to Tensor
        By decoder layer, float [q_heads, kept, dim].
    entries : mapping of int to tuple of Tensor
        The vision entries that were taken of its prompt, see `plphp.policy.entry_sampling.centred`; empty where none
        were.
    """

    number: int
    before: int
    tokens: int
    ahead: Tensor = field(repr=False)
    queries: Mapping[int, Tensor] = field(repr=False)
    entries: Entries = field(repr=False)

    def bank(self, rotations: Mapping[int, Rotation], record: Mapping[str, Any]) -> QueryBank:
        """The answer as a query bank, which can be saved; `of` makes the answer of it again.

        Parameters
        ----------
        rotations : mapping of int to Rotation
            By decoder layer.
        record : mapping
            JSON-ready; what is known of the model. The place of the answer is added.
        """
        layers = {layer: LayerBank(part, rotations[layer]) for layer, part in sorted(self.queries.items())}
        place = {"number": self.number, "before": self.before, "tokens": self.tokens}
        sampled = None
        if self.entries:
            count = next(iter(self.entries.values()))[0].shape[1]
            # All of them, so that nothing was drawn: they draw when they come into a sample of several prompts.
            sampled = EntrySample(torch.zeros(count, dtype=torch.float64), self.entries, 1)
        return QueryBank(layers, self.ahead, {**record, PLACE: place}, None, sampled)

    @classmethod
    def of(cls, bank: QueryBank) -> SampledAnswer:
        """The answer that `bank` made a query bank of.

        Raises
        ------
        ConfigError
            If it made none such.
        """
        place = bank.record.get(PLACE)
        keys = ("number", "before", "tokens")
        if not isinstance(place, dict) or any(type(place.get(key)) is not int for key in keys):
            raise ConfigError(f"its record says that it is of the answer {place!r}")
        queries = {number: layer.queries for number, layer in bank.layers.items()}
        entries = {} if bank.sampled is None else bank.sampled.layers
        return cls(place["number"], place["before"], place["tokens"], bank.ahead, queries, entries)
