# SPDX-License-Identifier: Apache-2.0
"""A uniform sample of the queries of answers, whose number is not known beforehand, and the query bank made of it."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.kernels.books import LayerBooks
from plphp.settings.checks import check_int

from .bank import LayerBank, QueryBank
from .entry_sampling import TOKENS, Entries, EntrySample
from .rotation import Rotation
from .sampled_answer import SampledAnswer

log = logging.getLogger("plphp")

SAMPLES = 400
"""Tokens of answers that a bank keeps the queries of, where nothing else is said."""


class BankSample:
    """A uniform sample of the tokens of all answers so far, the same tokens at every layer (reservoir sampling).

    Answers come whole, one after another; threads may share a sample.

    Parameters
    ----------
    size : int
        Tokens that are kept at most.
    seed : int
        Of the draws. The sample depends on it and on the lengths of the answers in their order.
    book_tokens : int
        Vision tokens whose entries are kept at most, for codebooks.

    Attributes
    ----------
    prompts : int
        Answers that were taken.
    answer_tokens : int
        Tokens of answers that the sample was drawn from.
    entries : EntrySample
        Sample of the vision entries of the prompts.
    """

    def __init__(self, size: int = SAMPLES, seed: int = 0, book_tokens: int = TOKENS) -> None:
        for name, number in (("samples", size), ("book_tokens", book_tokens)):
            check_int(name, number, minimum=1)
        check_int("seed", seed, minimum=0)
        self.size, self.seed, self.book_tokens = size, seed, book_tokens
        self.prompts = self.answer_tokens = 0
        self.entries = EntrySample()
        self._books: Mapping[int, LayerBooks] | None = None
        self._ahead: list[int] = []
        self._queries: dict[int, list[Tensor]] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, bank: QueryBank, size: int = SAMPLES) -> BankSample:
        """Go on with the sample that a bank was made of with the seed 0, as if it had never stopped.

        Codebooks that the bank has already stay: the entries that they were learned from are gone.

        Raises
        ------
        ConfigError
            If the bank does not hold such a sample.
        """
        sample = cls(size)
        prompts, tokens = bank.record.get("prompts"), bank.record.get("answer_tokens")
        ahead = bank.ahead.tolist()
        if type(prompts) is not int or type(tokens) is not int or not 0 < prompts <= tokens:
            raise ConfigError(f"its record says that it is of {prompts!r} prompts with {tokens!r} tokens")
        if len(ahead) != min(size, tokens):
            raise ConfigError(f"it holds {len(ahead)} samples of {tokens} tokens, expected {min(size, tokens)}")
        for number in range(size, tokens):
            sample._random.randrange(number + 1)  # the draws of the tokens that have gone by
        sample.prompts, sample.answer_tokens, sample._ahead = prompts, tokens, ahead
        sample._queries = {number: list(layer.queries.unbind(1)) for number, layer in bank.layers.items()}
        sample.entries, sample._books = bank.sampled or sample.entries, bank.books
        return sample

    def add(self, queries: Mapping[int, Tensor], entries: Entries | None = None) -> SampledAnswer | None:
        """Take the queries of a whole answer, and entries of its prompt.

        Parameters
        ----------
        queries : mapping of int to Tensor
            By decoder layer, float [q_heads, tokens, dim]: the queries of the tokens of the answer, from its first on
            (its last token has none), rotated back to position 0.
        entries : mapping of int to tuple of Tensor, optional
            Vision entries of the prompt, see `plphp.policy.entry_sampling.centred`.

        Returns
        -------
        SampledAnswer or None
            What was taken, in main memory, for `replay`; None for an answer that counts for nothing: without a query,
            or with one that is not finite.

        Raises
        ------
        ConfigError
            If the layers are not those of the answers before, or differ in their tokens.
        """
        lengths = {layer: part.shape[1] for layer, part in queries.items()}
        with self._lock:
            if len(set(lengths.values())) != 1 or (self._queries and self._queries.keys() != queries.keys()):
                raise ConfigError(
                    f"The answer has queries of so many tokens by layer: {lengths}, expected as many of each of the "
                    f"layers {', '.join(map(str, self._queries or queries))}."
                )
            tokens = next(iter(lengths.values()))
            if not tokens:
                return None
            if not all(bool(part.isfinite().all()) for part in queries.values()):
                log.warning("An answer is left out of the query bank: there is NaN or inf among its queries.")
                return None
            taken = self._take_entries(entries or {})
            number, before, places = self.prompts + 1, self.answer_tokens, self._places(tokens)
            ahead = torch.tensor(sorted(set(places.values())), dtype=torch.long)
            kept = {layer: part.detach()[:, ahead.to(part.device)].cpu() for layer, part in queries.items()}
            answer = SampledAnswer(number, before, tokens, ahead, kept, taken)
            self._put(answer, places)
            return answer

    def replay(self, answer: SampledAnswer) -> None:
        """Take what another sample took of an answer, and be what that one was then.

        Parameters
        ----------
        answer : SampledAnswer
            Of a sample of the same size and seed, which had taken the same answers before.

        Raises
        ------
        ConfigError
            If it is no such answer. The sample is of no use then.
        """
        with self._lock:
            if (answer.number, answer.before) != (self.prompts + 1, self.answer_tokens):
                raise ConfigError(
                    f"it holds answer {answer.number}, behind {answer.before} tokens, expected answer "
                    f"{self.prompts + 1}, behind {self.answer_tokens}"
                )
            places, ahead = self._places(answer.tokens), answer.ahead.tolist()
            shapes = {layer: tuple(part.shape) for layer, part in answer.queries.items()}
            known = {layer: (kept[0].shape[0], len(ahead), kept[0].shape[1]) for layer, kept in self._queries.items()}
            alike = all(len(shape) == 3 and shape[1] == len(ahead) for shape in shapes.values())
            if not answer.tokens or sorted(set(places.values())) != ahead or not alike or known not in ({}, shapes):
                raise ConfigError(
                    f"it holds the tokens {ahead} of {answer.tokens} with queries of the shapes {shapes}, and not what "
                    "a sample takes of this answer"
                )
            self._take_entries(answer.entries)
            self._put(answer, places)

    def _take_entries(self, entries: Entries) -> Entries:
        """Take entries of a prompt as long as there are no codebooks; those that were taken."""
        if self._books is not None:
            return {}
        before = self.entries
        self.entries = before.with_prompt(entries, self.book_tokens, self.seed)
        return {} if self.entries is before else entries

    def _places(self, tokens: int) -> dict[int, int]:
        """Draw for the tokens of the next answer: by place in the sample the token that comes there."""
        places = {}
        for token in range(tokens):
            number = self.answer_tokens
            self.answer_tokens += 1
            place = number if number < self.size else self._random.randrange(number + 1)
            if place < self.size:
                places[place] = token
        return places

    def _put(self, answer: SampledAnswer, places: Mapping[int, int]) -> None:
        kept = {layer: self._queries.setdefault(layer, []) for layer in answer.queries}
        column = {token: number for number, token in enumerate(answer.ahead.tolist())}
        for place, token in places.items():
            self._ahead[place : place + 1] = [token]  # also at the end, where it is added
            for layer, part in answer.queries.items():
                query = part[:, column[token]].clone()  # a view would keep the whole answer
                kept[layer][place : place + 1] = [query]
        self.prompts += 1

    def bank(self, rotations: Mapping[int, Rotation], record: Mapping[str, Any]) -> QueryBank:
        """The query bank of the sample so far.

        Parameters
        ----------
        rotations : mapping of int to Rotation
            By decoder layer.
        record : mapping
            JSON-ready; what is known of the model, see `plphp.policy.bank.QueryBank`. The numbers of prompts, tokens
            and samples, and the seed, are added; where there are vision entries, how many of how many prompts.

        Returns
        -------
        QueryBank
            Its codebooks are still to be learned from the entries, see `plphp.policy.book_learning.with_books`.

        Raises
        ------
        ConfigError
            If no answer was taken yet.
        """
        with self._lock:
            if not self._ahead:
                raise ConfigError("There is no query bank: no answer of more than one token was taken yet.")
            counts = {"prompts": self.prompts, "answer_tokens": self.answer_tokens, "samples": len(self._ahead)}
            layers = {
                layer: LayerBank(torch.stack(queries, dim=1), rotations[layer])
                for layer, queries in sorted(self._queries.items())
            }
            ahead, entries = torch.tensor(self._ahead), self.entries
            if len(entries):
                counts.update(book_tokens=len(entries), book_prompts=entries.prompts)
            books, sampled = self._books, entries if len(entries) else None
        return QueryBank(layers, ahead, {**record, **counts, "seed": self.seed}, books, sampled)
