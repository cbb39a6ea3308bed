# SPDX-License-Identifier: Apache-2.0
"""The queries that a model writes its answers with, heard while ``generate`` runs unpruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from plphp.families.spans import VisionSpans
from plphp.policy.rotation import Rotation
from plphp.pruning.scoring import Attended

from .answer_lengths import answer_lengths
from .cache import PrunedCache


class AnswerQueries:
    """Listens to a cache (`PrunedCache.listening`) while one batch of prompts is read and answered, without beams.

    The queries wait in memory until the answers have ended: only then is it known which tokens belong to them.

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

    def __call__(self, attended: Attended) -> None:
        """Keep the queries of a decoding step; see where the vision tokens are while the prompt is read."""
        reading = self._cache.reading
        if reading is not None and self._spans is None:
            self._spans = reading.spans
            self._copies = attended.query.shape[0] // reading.batch
            self._begin = self._positions_of_answers(reading.spans)
        if self._spans is None:
            return
        first_of_each = attended.query[:: self._copies]
        if reading is not None:
            # Without tokens: what an answer of a single token comes to.
            self._heard.setdefault(attended.layer, [first_of_each[:, :, :0].cpu()])
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
        rows = self._spans.vision.any(1).nonzero()[:, 0].tolist()
        return [
            {
                layer: self._rotated_back(queries[row, :, : lengths[row] - 1], row, rotations[layer])
                for layer, queries in heard.items()
            }
            for row in rows
        ]

    def _positions_of_answers(self, spans: VisionSpans) -> Tensor:
        """Rotary position of the first token of each answer, int64 [batch]."""
        begin = spans.valid.sum(1).cpu()
        turn = self._cache.turn
        return begin if turn is None else begin + turn.after[:, 0].cpu()

    def _rotated_back(self, queries: Tensor, row: int, rotation: Rotation) -> Tensor:
        return rotation.rotated(queries, -(self._begin[row] + torch.arange(queries.shape[1])))
