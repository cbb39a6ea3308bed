# SPDX-License-Identifier: Apache-2.0
"""A folder that keeps query banks over restarts: a file per model and weights, which processes may share.

A bank that is not complete grows with every answer. It is not written anew each time: what was taken of an answer is
a file of its own beside it, and these are read behind the bank in the order of their numbers. With every
`MOST_ANSWERS` of them, and when the bank is complete, all is written as one bank, and the files of answers go. A
process that ends between the two leaves answers that the bank holds already: their numbers say so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from plphp.errors import ConfigError
from plphp.io.locking import locked

from .answer_files import AnswerFiles
from .bank import QueryBank
from .bank_sampling import BankSample
from .rotation import Rotation
from .sampled_answer import PLACE, SampledAnswer

HASH_DIGITS = 16
"""Digits of the weights' hash in the name of a file; its record has all 64."""
MOST_ANSWERS = 16
"""Files of answers beside a bank, at most: so many are read when a session begins, and so much disk they take."""

State = tuple[tuple[str | int, ...], ...]
"""Name, time, inode and size of each file of a bank."""


@dataclass(frozen=True)
class BankModel:
    """The model that a bank is of.

    Parameters
    ----------
    model_type : str
        As in its config.
    decoder_layers : int
        Decoder layers of its text model.
    weights_sha256 : str
        SHA-256 of its weights, 64 hexadecimal digits; "" where no folder keeps its bank.
    """

    model_type: str
    decoder_layers: int
    weights_sha256: str = ""

    def record(self) -> dict[str, Any]:
        """What a bank of this model says of it, JSON-ready."""
        about = {"model_type": self.model_type, "decoder_layers": self.decoder_layers}
        return {**about, "weights_sha256": self.weights_sha256} if self.weights_sha256 else about


class Kept(NamedTuple):
    """What a folder keeps.

    Parameters
    ----------
    bank : QueryBank
        Complete or not.
    sample : BankSample
        The sample that it was made of.
    """

    bank: QueryBank
    sample: BankSample


class BankFolder:
    """The place of one model's bank in a folder.

    Parameters
    ----------
    folder : str or Path
        It is made where it is missing.
    model : BankModel
        Its ``weights_sha256`` is needed.

    Attributes
    ----------
    file : Path
        ``<folder>/<model_type>-<first 16 digits of the hash>.safetensors``.
    answers : AnswerFiles
        Of the answers that are not in it yet.

    Raises
    ------
    ConfigError
        If there can be no such folder.
    """

    def __init__(self, folder: str | Path, model: BankModel) -> None:
        if not re.fullmatch("[0-9a-f]{64}", model.weights_sha256):
            raise ConfigError(f"A kept query bank needs the SHA-256 of the weights, got {model.weights_sha256!r}.")
        self.model, folder = model, Path(folder).expanduser()
        name = re.sub(r"[^\w.-]", "_", model.model_type)
        self.file = folder / f"{name}-{model.weights_sha256[:HASH_DIGITS]}.safetensors"
        self.answers = AnswerFiles(self.file)
        if not self.changed():  # what is there can be read where nothing can be written
            check_folder(folder)

    def changed(self) -> State:
        """Changes when a file of the bank does; empty where there is none."""
        states: list[tuple[str | int, ...]] = []
        for path in (self.file, *self.answers.there().values()):
            try:
                about = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise ConfigError(f"Cannot read the query bank {path}: {error.strerror or error}.") from error
            states.append((path.name, about.st_mtime_ns, about.st_ino, about.st_size))
        return tuple(states)

    def load(self) -> Kept | None:
        """The bank that is kept, complete or not; None where there is none.

        Nobody is kept from writing meanwhile. What was not all of one moment is read again.

        Raises
        ------
        ConfigError
            If a file cannot be read, is broken, or is of other weights. It stays as it is.
        """
        while True:
            state = self.changed()
            try:
                kept = self._load()
            except ConfigError:
                if self.changed() == state:
                    raise
            else:
                if self.changed() == state:
                    return kept

    def save(self, bank: QueryBank) -> None:
        """Keep a bank, complete at once, in the place of what is kept.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        self._write(bank, self.file)
        self.answers.forget(bank.record["prompts"])

    def add(self, answer: SampledAnswer, rotations: Mapping[int, Rotation], record: Mapping[str, Any]) -> None:
        """Keep an answer behind those that are kept, complete at once.

        Parameters
        ----------
        answer : SampledAnswer
            What a sample took of it that had taken those that are kept.
        rotations, record
            As for `plphp.policy.bank_sampling.BankSample.bank`.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        self._write(answer.bank(rotations, record), self.answers.of(answer.number))

    def has_room(self, answers: int) -> bool:
        """Whether so many answers more can be added before all has to be saved as one bank."""
        return len(self.answers.there()) + answers <= MOST_ANSWERS

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing the file meanwhile, where the system has locks."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.file.with_suffix(".lock")))
            except OSError as error:
                folder, reason = self.file.parent, error.strerror or error
                raise ConfigError(f"Cannot write to the folder {folder}: {reason}.") from error
            yield

    def _load(self) -> Kept | None:
        bank, sample = None, BankSample()
        if self.file.exists():
            bank = self._read(self.file)
            try:
                sample = BankSample.of(bank)
            except ConfigError as error:
                raise self._refusal(self.file, f"The query bank {self.file} is broken: {error}.") from error
        self.answers.forget(sample.prompts)
        newest = None
        for file in self.answers.there(behind=sample.prompts).values():
            newest = self._read(file)
            try:
                sample.replay(SampledAnswer.of(newest))
            except ConfigError as error:
                reason = f"The file {file} does not continue the query bank that it stands beside: {error}."
                raise self._refusal(file, reason) from error
        if newest is not None:
            rotations = {number: layer.rotation for number, layer in newest.layers.items()}
            bank = sample.bank(rotations, {name: newest.record[name] for name in newest.record if name != PLACE})
            bank = bank.rounded()
        return None if bank is None else Kept(bank, sample)

    def _read(self, file: Path) -> QueryBank:
        """The bank of a file, which has to be of this model."""
        try:
            bank = QueryBank.load(file)
        except ConfigError as error:
            raise self._refusal(file, str(error)) from error
        expected = self.model.record()
        differs = [name for name in reversed(expected) if bank.record.get(name) != expected[name]]
        if differs:
            name = differs[0]
            raise self._refusal(
                file,
                f"{file} is a query bank of another model: its {name} is {bank.record.get(name)!r}, and that of "
                f"this model is {expected[name]!r}.",
            )
        return bank

    def _write(self, bank: QueryBank, file: Path) -> None:
        try:
            bank.save(file)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"Cannot write the query bank {file}: {reason}.") from error

    def _refusal(self, file: Path, reason: str) -> ConfigError:
        """The error for a file that cannot be used, for a reason in whole sentences."""
        answers = f"the files {self.answers.pattern()}"
        if file != self.file:
            away = f"{answers} away to collect anew what they hold"
        else:
            away = f"the file {file} {f'and {answers} ' if self.answers.there() else ''}away to collect a bank anew"
        return ConfigError(
            f"The folder of kept query banks cannot be used. {reason} Move {away}, or name another folder."
        )


def check_folder(folder: str | Path) -> None:
    """Make a folder where it is missing.

    Raises
    ------
    ConfigError
        If it cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot make the folder {folder} for query banks: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"Cannot write to the folder {folder} for query banks: name another.")
