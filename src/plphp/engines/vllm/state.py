# SPDX-License-Identifier: Apache-2.0
"""What the worker holds from pass to pass: its setup, the requests that it knows, and the prompts to be reported.

A prompt is reported once all its layers are done and not layer by layer: the scheduler frees its blocks and logs one
line. Requests have no end here: a request is forgotten when the model runner no longer lists it, and read anew when it
starts again from its first token, as after a preemption.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .own_bank import OwnBankCollector
from .pruned_prompt import PrunedPrompt
from .reading import PrunedPart, RequestReading
from .setup import Setup

_logger = logging.getLogger("vllm.plphp")


@dataclass
class Pruning:
    """The state of one worker.

    Parameters
    ----------
    setup : Setup
        How the worker prunes.
    own_bank : OwnBankCollector, optional
        For a method that asks for a bank which the engine collects by itself.
    """

    setup: Setup
    own_bank: OwnBankCollector | None = None
    _readings: dict[str, RequestReading] = field(default_factory=dict)
    _pending: dict[str, PrunedPrompt] = field(default_factory=dict)
    _done: dict[str, PrunedPrompt] = field(default_factory=dict)
    _in_pass: bool = False

    def reading(self, request_id: str, request: Any, computed: int) -> RequestReading:
        """The reading of a request; a new one where it is unknown or begins anew, as after a preemption."""
        known = self._readings.get(request_id)
        if known is None or computed == 0:
            # What was noted belongs to blocks that vLLM has taken back with the preemption.
            self._pending.pop(request_id, None)
            own = None if self.own_bank is None else partial(self.own_bank.bank_for, request_id, request)
            known = self._readings[request_id] = RequestReading.of(request, self.setup, own)
        return known

    def forget_all_but(self, alive: Container[str]) -> None:
        """Before a pass, free what is held of requests that have ended."""
        self._in_pass = True
        self._forget([request_id for request_id in self._readings if request_id not in alive])

    def forget_without_pass(self, ended: Iterable[str]) -> None:
        """Free what is held of requests that have ended, unless that was done before the pass that ends now.

        When all requests have ended, vLLM names them once more, but there is no pass before the next request.
        """
        if not self._in_pass:
            self._forget(ended)
        self._in_pass = False

    def _forget(self, ended: Iterable[str]) -> None:
        for request_id in ended:
            self._readings.pop(request_id, None)
            self._pending.pop(request_id, None)
            if self.own_bank is not None:
                self.own_bank.end(request_id)

    def note(self, request_id: str, reading: RequestReading, part: PrunedPart) -> None:
        """Note down what a layer has kept of a prompt."""
        if request_id not in self._pending:
            self._pending[request_id] = PrunedPrompt(reading.tokens, reading.vision_tokens)
        self._pending[request_id].add(part.layer, part.allocation, part.kept, part.blocks)

    def done(self, request_id: str, reading: RequestReading) -> None:
        """Report a prompt whose layers are all done."""
        reading.finish()
        if request_id in self._pending:
            self._done[request_id] = self._pending.pop(request_id)

    def give_up(self, request_id: str, reading: RequestReading, reason: str) -> None:
        """Keep the undecided layers of a prompt whole, and log the reason: a request must not end the server."""
        _logger.error("plphp keeps what is left of the prompt of request %s whole: %s.", request_id, reason)
        self.done(request_id, reading)

    def take_pruned(self) -> dict[str, PrunedPrompt]:
        """Hand over the prompts that were pruned since the last call."""
        prompts, self._done = self._done, {}
        return prompts
