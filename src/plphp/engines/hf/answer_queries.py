# SPDX-License-Identifier: Apache-2.0
"""The queries that a model writes its answers with, and vision entries of its prompts, heard while it runs unpruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from plphp.families.spans import VisionSpans
from plphp.policy.entry_sampling import Entries, centred, drawn
from plphp.policy.rotation import Rotation
from plphp.pruning.scoring import Attended

from .answer_lengths import answer_lengths
from .cache import PrunedCache


class AnswerQueries:
    """Listens to a cache (`PrunedCache.listening`) while one batch of prompts is read and answered, without beams.

    The queries wait in memory until the answers have ended: only then is it known which tokens belong to them. Of the
    vision entries a few of each prompt are taken when a layer has read it.

    Parameters
    ----------
    cache : PrunedCache
        It evicts nothing, so that the queries are those of the model itself.
    """

    def __init__(self, cache: PrunedCache) -> None:
        self._cache = cache
        self._spans: VisionSpans | None = None
        self._copies = 1  # rows that `generate` made of each prompt, for several returned sequences
        self._begin = torch.zeros(0, dtype=torch.long)
        self._heard: dict[int, list[Tensor]] = {}
        self._entries: list[dict[int, tuple[Tensor, Tensor] | None]] = []

    def __call__(self, attended: Attended) -> None:
        """Keep the queries of a decoding step; see where the vision tokens are while the prompt is read."""
        reading = self._cache.reading
        if reading is not None and self._spans is None:
            self._spans = reading.spans
            self._copies = attended.query.shape[0] // reading.batch
            self._begin = self._positions_of_answers(reading.spans)
            self._entries = [{} for _ in self._rows(reading.spans)]
        if self._spans is None:
            return
        first_of_each = attended.query[:: self._copies]
        if reading is not None:
            # Without tokens: what an answer of a single token comes to.
            self._heard.setdefault(attended.layer, [first_of_each[:, :, :0].cpu()])
            if attended.entries.length >= self._spans.end:
                self._take_entries(attended, self._spans)
        else:
            self._heard[attended.layer].append(first_of_each.to("cpu", copy=True))

    def answers(
        self, output: Any, config: GenerationConfig, rotations: Mapping[int, Rotation]
    ) -> list[dict[int, Tensor]]:
        """The queries of the answer to each prompt with vision tokens, for `plphp.policy.bank_sampling.BankSample`.

        Of several sequences that were returned for a prompt, the first counts.

        Parameters
        ----------
        output : Tensor or ModelOutput
            What ``generate`` returned.
        config : GenerationConfig
            What it was called with.
        rotations : mapping of int to Rotation
            By decoder layer.

        Returns
        -------
        list of dict of int to Tensor
            By decoder layer, float32 [q_heads, tokens, dim], rotated back to position 0. Without tokens for an answer
            of a single token, which no query was made for.
        """
        if self._spans is None:
            return []
        heard = {layer: torch.cat(parts, dim=2) for layer, parts in self._heard.items()}
        steps = next((queries.shape[2] for queries in heard.values()), 0)
        sequences = output if isinstance(output, Tensor) else output.sequences
        # The last token that was chosen has not been read by the model.
        lengths = answer_lengths(sequences[:: self._copies, -(steps + 1) :].cpu(), config)
        return [
            {
                layer: self._rotated_back(queries[row, :, : lengths[row] - 1], row, rotations[layer])
                for layer, queries in heard.items()
            }
            for row in self._rows(self._spans)
        ]

    def entries(self) -> list[Entries]:
        """Vision entries of each prompt with vision tokens, in the order of `answers`.

        Returns
        -------
        list of mapping of int to tuple of Tensor
            See `plphp.policy.entry_sampling.centred`; empty where product codes do not fit the heads of some layer.
        """
        return [
            {layer: pair for layer, pair in layers.items() if pair is not None and None not in layers.values()}
            for layers in self._entries
        ]

    def _take_entries(self, attended: Attended, spans: VisionSpans) -> None:
        """Take some entries of each prompt from a layer, whose tail holds all of it."""
        keys, values = attended.entries.tail()
        before = attended.entries.prefix_length
        for layers, row in zip(self._entries, self._rows(spans), strict=True):
            vision = spans.vision[row, before:].to(keys.device)
            own = row * self._copies
            which = drawn(int(vision.sum()), int(spans.valid[row].sum()))
            of_prompt = keys[own, :, : len(vision)][:, vision], values[own, :, : len(vision)][:, vision]
            layers[attended.layer] = centred(*of_prompt, which)

    @staticmethod
    def _rows(spans: VisionSpans) -> list[int]:
        """The rows with vision tokens."""
        rows: list[int] = spans.vision.any(1).nonzero()[:, 0].tolist()
        return rows

    def _positions_of_answers(self, spans: VisionSpans) -> Tensor:
        """Rotary position of the first token of each answer, int64 [batch]."""
        begin = spans.valid.sum(1).cpu()
        turn = self._cache.turn
        return begin if turn is None else begin + turn.after[:, 0].cpu()

    def _rotated_back(self, queries: Tensor, row: int, rotation: Rotation) -> Tensor:
        return rotation.rotated(queries, -(self._begin[row] + torch.arange(queries.shape[1])))
