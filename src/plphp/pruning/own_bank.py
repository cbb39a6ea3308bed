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
from plphp.policy.bank_folder import BankFolder, BankModel, State
from plphp.policy.bank_sampling import BankSample
from plphp.policy.book_learning import with_books
from plphp.policy.entry_sampling import Entries
from plphp.policy.evidence import OwnBank
from plphp.policy.rotation import Rotation
from plphp.policy.sampled_answer import SampledAnswer

from .report import BankProgress

log = logging.getLogger("plphp")


class BankCollection:
    """Collects the bank that a method asks for with `plphp.policy.evidence.OwnBank`. Threads may share it.

    As long as `bank` is None, an engine answers unpruned and hands the queries of the answers to `add`. With a folder,
    the files there say how far the collection is: processes that share it add to the same bank.

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
        self._read: State = ()  # what the files were when they were read or written last
        self._saved = 0  # prompts that they are of
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
        """Take in what another process has added to the folder, if there is one.

        Raises
        ------
        ConfigError
            If a file there cannot be used.
        """
        with self._lock:
            if self._bank is not None or self._folder is None or self._folder.changed() == self._read:
                return
            changed, kept = self._folder.changed(), self._folder.load()
            self._read, self._saved = changed, 0 if kept is None else kept.sample.prompts
            if kept is not None and self._saved >= self.wanted.prompts:
                self._finish(kept.bank)
            else:
                self._sample = BankSample() if kept is None else kept.sample

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
            What else the record of the bank is to say of the model, JSON-ready; asked when something is written or the
            bank is complete, as it may take long.

        Returns
        -------
        BankProgress
        """
        heard = list(zip(answers, entries or [{}] * len(answers), strict=True))
        with self._lock:
            refreshed = False
            try:
                with nullcontext() if self._folder is None else self._folder.locked():
                    self.refresh()
                    refreshed = True
                    taken = self._take(heard)
                    if self._sample.prompts >= self.wanted.prompts:
                        self._complete(rotations, {**self.model.record(), **about()})
                    elif taken:
                        if self._folder is not None:
                            self._save(self._folder, taken, rotations, {**self.model.record(), **about()})
                        self._log_progress()
            except ConfigError as error:
                if self._folder is None:
                    raise
                log.error("%s Nothing is pruned before the query bank is saved; the next answer tries again.", error)
                if not refreshed:
                    self._take(heard)
            return self.progress

    def _take(self, heard: Sequence[tuple[Mapping[int, Tensor], Entries]]) -> list[SampledAnswer]:
        """Add answers to the sample as long as it wants any; what it took of them."""
        if self._bank is not None:
            return []
        all_taken = []
        for queries, entries in heard:
            if self._sample.prompts < self.wanted.prompts:
                taken = self._sample.add(queries, entries)
                self._useless = self._useless + 1 if taken is None else 0
                all_taken += [] if taken is None else [taken]
        if self._useless >= self.wanted.prompts:
            log.warning(
                "The last %d answer(s) gave nothing to the query bank, and nothing is pruned before it is complete: an "
                "answer of a single token has no query that could be kept. Ask for longer answers, or collect a bank "
                "from such with plphp collect and give its file (bank=FILE).",
                self._useless,
            )
            self._useless = 0
        return all_taken

    def _save(
        self,
        folder: BankFolder,
        taken: Sequence[SampledAnswer],
        rotations: Mapping[int, Rotation],
        record: Mapping[str, Any],
    ) -> None:
        """Keep what the sample took since the last call: the answers alone, or where that does not do, all of it."""
        if self._saved + len(taken) == self._sample.prompts and folder.has_room(len(taken)):
            for answer in taken:
                folder.add(answer, rotations, record)
                self._note_saved(folder, answer.number)
        else:  # there is no room for them, or those before could not be saved and are in the sample alone
            folder.save(self._sample.bank(rotations, record).rounded())
            self._note_saved(folder, self._sample.prompts)

    def _note_saved(self, folder: BankFolder, prompts: int) -> None:
        self._read, self._saved = folder.changed(), prompts

    def _complete(self, rotations: Mapping[int, Rotation], record: Mapping[str, Any]) -> None:
        bank = with_books(self._sample.bank(rotations, record).rounded(), self._device)
        where = ""
        if self._folder is not None:
            self._folder.save(bank)
            self._note_saved(self._folder, self._sample.prompts)
            where = f" It is kept in {self._folder.file}."
        self._log_progress()
        self._finish(bank)
        done, queries = bank.record["prompts"], len(bank.ahead)
        log.info("The query bank is complete: %d prompts, %d queries; pruning from now on.%s", done, queries, where)

    def _log_progress(self) -> None:
        log.info("The query bank is of %d of %d prompts.", self._sample.prompts, self.wanted.prompts)

    def _finish(self, bank: QueryBank) -> None:
        # The file of a session that wants more prompts has the entries alone.
        self._bank = with_books(bank, self._device)
        self._sample = BankSample()
