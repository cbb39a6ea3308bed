# SPDX-License-Identifier: Apache-2.0
"""What the worker holds from pass to pass: the settings, the requests that it knows, and what is to be reported."""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from plphp.policy.chain import Chain

from .news import PrunedPrompt
from .ranks import Ranks
from .reading import PrunedPart, RequestReading

_logger = logging.getLogger("vllm.plphp")


@dataclass
class Pruning:
    """The state of one worker.

    Parameters
    ----------
    chain : Chain
        What is done at each stage.
    layers : int
        Decoder layers of the model.
    block_size : int
        Tokens of a block of the pool.
    ranks : Ranks
        Who shares the heads of a layer.
    """

    chain: Chain
    layers: int
    block_size: int
    ranks: Ranks = field(default_factory=Ranks)
    _readings: dict[str, RequestReading] = field(default_factory=dict)
    _pending: dict[str, PrunedPrompt] = field(default_factory=dict)
    _news: dict[str, PrunedPrompt] = field(default_factory=dict)

    def reading(self, request_id: str, request: Any, computed: int) -> RequestReading:
        """What is known of a request; nothing where it begins anew, as after a preemption."""
        known = self._readings.get(request_id)
        if known is None or computed == 0:
            self._pending.pop(request_id, None)
            known = self._readings[request_id] = RequestReading.of(
                request, self.chain, self.layers, self.block_size, self.ranks
            )
        return known

    def forget_all_but(self, alive: Container[str]) -> None:
        """Let go of requests that have ended."""
        for request_id in [request_id for request_id in self._readings if request_id not in alive]:
            del self._readings[request_id]
            self._pending.pop(request_id, None)

    def note(self, request_id: str, reading: RequestReading, part: PrunedPart) -> None:
        """Note down what a layer has kept of a prompt."""
        if request_id not in self._pending:
            self._pending[request_id] = PrunedPrompt(reading.tokens, reading.vision_tokens)
        self._pending[request_id].add(part.layer, part.allocation, part.kept, part.blocks)

    def done(self, request_id: str, reading: RequestReading) -> None:
        """Report a prompt whose layers are all done."""
        reading.finish()
        if request_id in self._pending:
            self._news[request_id] = self._pending.pop(request_id)

    def give_up(self, request_id: str, reading: RequestReading, reason: str) -> None:
        """Keep the rest of a prompt whole that cannot be pruned."""
        _logger.error("plphp keeps what is left of the prompt of request %s whole: %s.", request_id, reason)
        self.done(request_id, reading)

    def take_news(self) -> dict[str, PrunedPrompt]:
        """The prompts that were pruned since the last call."""
        news, self._news = self._news, {}
        return news
