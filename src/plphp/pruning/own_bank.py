# SPDX-License-Identifier: Apache-2.0
"""The bank that an engine collects by itself: from none, over a growing number of answers, to complete."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from plphp.errors import ConfigError
from plphp.policy.bank import QueryBank
from plphp.policy.bank_folder import BankFolder, BankModel
from plphp.policy.bank_sampling import SAMPLES, BankSample
from plphp.policy.evidence import OwnBank
from plphp.policy.rotation import Rotation

from .report import BankProgress

log = logging.getLogger("plphp")


class BankCollection:
    """Collects the bank that a method asks for with `plphp.policy.evidence.OwnBank`. Threads may share it.

    As long as `bank` is None, an engine answers unpruned and hands the queries of the answers to `add`. With a folder,
    the file there says how far the collection is: processes that share it add to the same bank.

    Parameters
    ----------
    wanted : OwnBank
        What is asked for.
    model : BankModel
        The model; its hash is needed where ``wanted`` names a folder.
    size : int
        Tokens of answers whose queries are kept at most.

    Raises
    ------
    ConfigError
        If the folder or the file in it cannot be used.
    """

    def __init__(self, wanted: OwnBank, model: BankModel, size: int = SAMPLES) -> None:
        self.wanted, self.model = wanted, model
        self._folder = BankFolder(wanted.folder, model) if wanted.folder else None
        self._sample = BankSample(size)
        self._bank: QueryBank | None = None
        self._read: tuple[int, ...] | None = None  # what the file was when it was read or written last
        self._told = False
        self._lock = threading.RLock()
        self.refresh()
        if self._bank is not None and self._folder is not None:
            log.info("Pruning by the query bank of %d prompts in %s.", self.progress.collected, self._folder.file)

    @property
    def bank(self) -> QueryBank | None:
        """The bank, once it is complete; its queries are rounded as in a file, so that a saved bank prunes alike."""
        return self._bank

    @property
    def progress(self) -> BankProgress:
        """How many prompts the bank is of by now."""
        return BankProgress(self._sample.prompts, self.wanted.prompts)

    def refresh(self) -> None:
        """Take in what another process has added to the file, if there is one.

        Raises
        ------
        ConfigError
            If the file cannot be used.
        """
        with self._lock:
            if self._bank is not None or self._folder is None or self._folder.changed() == self._read:
                return
            changed, kept = self._folder.changed(), self._folder.load()
            try:
                self._sample = BankSample(self._sample.size) if kept is None else BankSample.of(kept, self._sample.size)
            except ConfigError as error:
                raise self._folder.refusal(f"The query bank {self._folder.file} is broken: {error}.") from error
            self._read = changed
            if kept is not None and self._sample.prompts >= self.wanted.prompts:
                self._bank = kept

    def tell(self) -> None:
        """Warn, once, that answers are not pruned yet."""
        with self._lock:
            if not self._told:
                self._told = True
                log.warning(
                    "There is no query bank yet: the next %d answer(s) to prompts with vision tokens, this one "
                    "included, are not pruned, and the bank is collected from them.",
                    self.wanted.prompts - self._sample.prompts,
                )

    def add(self, answers: Sequence[Mapping[int, Tensor]], rotations: Mapping[int, Rotation]) -> BankProgress:
        """Take the queries of whole answers; what comes after the bank is complete counts for nothing.

        Parameters
        ----------
        answers : sequence of mapping of int to Tensor
            As for `plphp.policy.bank_sampling.BankSample.add`.
        rotations : mapping of int to Rotation
            By decoder layer.

        Returns
        -------
        BankProgress

        Raises
        ------
        ConfigError
            If the file in the folder cannot be used.
        """
        with self._lock, self._alone():
            self.refresh()
            before = self._sample.prompts
            for queries in answers:
                if self._sample.prompts < self.wanted.prompts:
                    self._sample.add(queries)
            full = self._sample.prompts >= self.wanted.prompts  # also where the last save has failed
            if self._bank is None and (full or self._sample.prompts > before):
                self._keep(rotations)
            return self.progress

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._folder is None:
            yield
            return
        with self._folder.locked():
            yield

    def _keep(self, rotations: Mapping[int, Rotation]) -> None:
        bank = self._sample.bank(rotations, self.model.record()).rounded()
        if self._folder is not None:
            self._folder.save(bank)
            self._read = self._folder.changed()
        done, wanted = self._sample.prompts, self.wanted.prompts
        log.info("The query bank is of %d of %d prompts.", done, wanted)
        if done >= wanted:
            self._bank = bank
            where = "" if self._folder is None else f" It is kept in {self._folder.file}."
            queries = len(bank.ahead)
            log.info("The query bank is complete: %d prompts, %d queries; pruning from now on.%s", done, queries, where)
