# SPDX-License-Identifier: Apache-2.0
"""The query bank that a server collects by itself: the answers to the first prompts, which are not pruned, are heard.

A prompt is decided when it begins: whole as long as there is no bank, and then as the bank says, whatever happens to
the bank or to the request meanwhile. An answer counts once its request has ended, however it did, or as much of it was
heard as is held; an answer of one token has no query. Nothing that fails here may end the engine: an error costs an
answer.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from plphp.policy.bank import QueryBank
from plphp.policy.rotation import Rotation
from plphp.pruning.own_bank import BankCollection
from plphp.pruning.report import BankProgress

from .heard_answer import HeardAnswer

_logger = logging.getLogger("vllm.plphp")


class OwnBankCollector:
    """Collects the bank in a worker, and says for each prompt by which bank it is pruned.

    Parameters
    ----------
    collection : BankCollection
        What was collected, kept in a folder that other processes may share.
    rotations : dict of int to Rotation
        By decoder layer.
    q_heads, dim : int
        Query heads of a layer, and their dimension.

    Raises
    ------
    ConfigError
        If there is a bank already, and it is of a model with other layers or another rotation.
    """

    def __init__(self, collection: BankCollection, rotations: dict[int, Rotation], q_heads: int, dim: int) -> None:
        self.collection, self.rotations = collection, rotations
        self._q_heads, self._dim = q_heads, dim
        self._bank: QueryBank | None = None
        self._decided: dict[str, tuple[Any, QueryBank | None]] = {}
        self._answers: dict[str, HeardAnswer] = {}
        self._whole = 0
        self._reported: BankProgress | None = None
        self._take_bank()
        if self._bank is None:
            self._log_progress()

    def bank_for(self, request_id: str, request: Any) -> QueryBank | None:
        """The bank by which the prompt of a request with vision tokens is pruned; None where it stays whole.

        The same however often the request begins, as after a preemption.
        """
        known = self._decided.get(request_id)
        if known is not None and known[0] is request:
            return known[1]
        self.end(request_id)  # of a request that had the same id
        self._refresh()
        self._decided[request_id] = request, self._bank
        if self._bank is None:
            self._begin(request_id, request)
        return self._bank

    def hear(self, request_id: str, layer: int, position: int, query: Tensor) -> None:
        """Take the queries [tokens, q_heads, dim] of a layer for an answer, the first of them at a position."""
        answer = self._answers.get(request_id)
        if answer is None or not len(query):
            return
        try:
            answer.hear(layer, position, query)
        except Exception as error:  # whatever it is, the answer goes on without being heard
            del self._answers[request_id]
            _logger.error("plphp does not hear the answer to request %s: %s.", request_id, error)
            return
        if layer == max(self.rotations) and answer.is_full():
            self._take_in(request_id)

    def end(self, request_id: str) -> None:
        """Take in the answer of a request that has ended."""
        self._decided.pop(request_id, None)
        self._take_in(request_id)

    def take_whole(self) -> int:
        """How many prompts with vision tokens stayed whole for want of a bank since the last call."""
        whole, self._whole = self._whole, 0
        return whole

    def take_progress(self) -> BankProgress | None:
        """How far the bank is, None where that is as at the last call."""
        progress = self.collection.progress
        if progress == self._reported:
            return None
        self._reported = progress
        return progress

    def _take_in(self, request_id: str) -> None:
        """Add what was heard of an answer to the bank."""
        answer = self._answers.pop(request_id, None)
        if answer is None or self._bank is not None:
            return
        before = self.collection.progress.collected
        try:
            queries = answer.unrotated(self.rotations)
            if queries:
                self.collection.add([queries], self.rotations)
            self._take_bank()
        except Exception as error:
            _logger.error("plphp cannot add the answer to request %s to its query bank: %s", request_id, error)
        if self._bank is None and self.collection.progress.collected != before:
            self._log_progress()

    def _begin(self, request_id: str, request: Any) -> None:
        self._whole += 1
        # Not more than are missing: each may hold much memory.
        if len(self._answers) < self.collection.progress.missing:
            self._answers[request_id] = HeardAnswer(request)

    def _refresh(self) -> None:
        """Take in what another process has added to the folder, and save again what could not be saved."""
        if self._bank is not None:
            return
        try:
            self.collection.refresh()
            if not self.collection.progress.missing:
                self.collection.add([], self.rotations)
            self._take_bank()
        except Exception as error:
            _logger.error("plphp cannot use its query bank, and keeps prompts whole: %s", error)

    def _take_bank(self) -> None:
        """Prune by the bank from now on, if it is complete and of this model."""
        bank = self.collection.bank
        if bank is None or self._bank is not None:
            return
        bank.check_rotations(self.rotations)
        for layer in self.rotations:
            bank.of(layer).check(self._q_heads, self._dim)
        self._bank = bank
        self._answers.clear()
        self._log_progress()

    def _log_progress(self) -> None:
        progress = self.collection.progress
        if self._bank is None:
            text = "the next prompts stay whole"
        else:
            text = "it is complete, the next prompts are pruned by it"
        _logger.info("plphp: the query bank is of %d of %d prompts; %s.", progress.collected, progress.wanted, text)
