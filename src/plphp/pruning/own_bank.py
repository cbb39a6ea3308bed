# SPDX-License-Identifier: Apache-2.0
"""The bank that an engine collects by itself: from none, over a growing number of answers, to complete."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.policy.bank import QueryBank
from plphp.policy.bank_folder import BankFolder, BankModel
from plphp.policy.bank_sampling import BankSample
from plphp.policy.book_learning import with_books
from plphp.policy.entry_sampling import Entries
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
    device : torch.device, optional
        Where the codebooks are learned when the bank is complete; default: main memory.

    Raises
    ------
    ConfigError
        If the folder or the file in it cannot be used.
    """

    def __init__(self, wanted: OwnBank, model: BankModel, device: torch.device | None = None) -> None:
        self.wanted, self.model, self._device = wanted, model, device
        self._folder = BankFolder(wanted.folder, model) if wanted.folder else None
        self._sample = BankSample()  # empty again once there is the bank
        self._bank: QueryBank | None = None
        self._read: tuple[int, ...] | None = None  # what the file was when it was read or written last
        self._warned = False
        self._useless = 0  # answers in a row that counted for nothing
        self._lock = threading.RLock()
        self.refresh()
        if self._bank is not None and self._folder is not None:
            log.info("Pruning by the query bank of %d prompts in %s.", self.progress.collected, self._folder.file)

    @property
    def bank(self) -> QueryBank | None:
        """The bank with its codebooks, once it is complete.

        Its queries are rounded as in a file, so that a saved bank prunes alike.
        """
        return self._bank

    @property
    def progress(self) -> BankProgress:
        """How many prompts the bank is of by now."""
        sample, bank = self._sample, self._bank  # in this order: the sample is emptied when there is a bank
        return BankProgress(sample.prompts if bank is None else bank.record["prompts"], self.wanted.prompts)

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
                sample = BankSample() if kept is None else BankSample.of(kept)
            except ConfigError as error:
                raise self._folder.refusal(f"The query bank {self._folder.file} is broken: {error}.") from error
            self._read = changed
            if kept is not None and sample.prompts >= self.wanted.prompts:
                self._finish(kept)
            else:
                self._sample = sample

    def warn_unpruned(self) -> None:
        """Warn, once, that answers are not pruned yet."""
        with self._lock:
            if not self._warned:
                self._warned = True
                log.warning(
                    "There is no query bank yet: the next %d answer(s) to prompts with vision tokens, this one "
                    "included, are not pruned, and the bank is collected from them.",
                    self.wanted.prompts - self._sample.prompts,
                )

    def add(
        self,
        answers: Sequence[Mapping[int, Tensor]],
        rotations: Mapping[int, Rotation],
        entries: Sequence[Entries] = (),
        about: Callable[[], Mapping[str, Any]] = dict,
    ) -> BankProgress:
        """Take the queries of whole answers, and entries of their prompts.

        What comes after the bank is complete counts for nothing.

        An answer is finished by now, so that a folder that cannot be used is no error: it is logged, and what could not
        be saved waits in memory for the next call. The bank of a folder is complete once it is saved.

        Parameters
        ----------
        answers : sequence of mapping of int to Tensor
            As for `plphp.policy.bank_sampling.BankSample.add`.
        rotations : mapping of int to Rotation
            By decoder layer.
        entries : sequence of mapping of int to tuple of Tensor
            For each answer the vision entries of its prompt, see `plphp.policy.entry_sampling.centred`; none at all
            from an engine that does not hear them, whose bank has no codebooks.
        about : callable, optional
            What else the record of the bank is to say of the model, JSON-ready; asked when a bank is made of the
            sample, as it may take long.

        Returns
        -------
        BankProgress
        """
        heard = list(zip(answers, entries or [{}] * len(answers), strict=True))
        with self._lock:
            taken = False
            try:
                with nullcontext() if self._folder is None else self._folder.locked():
                    self.refresh()
                    taken = True
                    if self._take(heard):
                        self._keep(rotations, about)
            except ConfigError as error:
                if self._folder is None:
                    raise
                log.error("%s Nothing is pruned before the query bank is saved; the next answer tries again.", error)
                if not taken:
                    self._take(heard)
            return self.progress

    def _take(self, heard: Sequence[tuple[Mapping[int, Tensor], Entries]]) -> bool:
        """Add answers to the sample as long as it wants any; whether there is something to save."""
        if self._bank is not None:
            return False
        before = self._sample.prompts
        for queries, entries in heard:
            if self._sample.prompts < self.wanted.prompts:
                self._useless = 0 if self._sample.add(queries, entries) else self._useless + 1
        if self._useless >= self.wanted.prompts:
            log.warning(
                "The last %d answer(s) gave nothing to the query bank, and nothing is pruned before it is complete: an "
                "answer of a single token has no query that could be kept. Ask for longer answers, or collect a bank "
                "from such with plphp collect and give its file (bank=FILE).",
                self._useless,
            )
            self._useless = 0
        # Where the last save has failed, the sample is full without any answer more.
        return self._sample.prompts > before or self._sample.prompts >= self.wanted.prompts

    def _keep(self, rotations: Mapping[int, Rotation], about: Callable[[], Mapping[str, Any]]) -> None:
        done, wanted = self._sample.prompts, self.wanted.prompts
        if self._folder is None and done < wanted:
            log.info("The query bank is of %d of %d prompts.", done, wanted)
            return
        bank = self._sample.bank(rotations, {**self.model.record(), **about()}).rounded()
        if done >= wanted:
            bank = with_books(bank, self._device)
        if self._folder is not None:
            self._folder.save(bank)
            self._read = self._folder.changed()
        log.info("The query bank is of %d of %d prompts.", done, wanted)
        if done >= wanted:
            self._finish(bank)
            where = "" if self._folder is None else f" It is kept in {self._folder.file}."
            queries = len(bank.ahead)
            log.info("The query bank is complete: %d prompts, %d queries; pruning from now on.%s", done, queries, where)

    def _finish(self, bank: QueryBank) -> None:
        # The file of a session that wants more prompts has the entries alone.
        self._bank = with_books(bank, self._device)
        self._sample = BankSample()
