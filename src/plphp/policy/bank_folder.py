# SPDX-License-Identifier: Apache-2.0
"""A folder that keeps query banks over restarts: a file per model and weights, which processes may share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from plphp.errors import ConfigError
from plphp.io.locking import locked

from .bank import QueryBank

HASH_DIGITS = 16
"""Digits of the weights' hash in the name of a file; its record has all 64."""


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
        if not self.file.exists():  # a bank that is complete can be read where nothing can be written
            check_folder(folder)

    def changed(self) -> tuple[int, ...] | None:
        """Changes when the file does; None where there is none."""
        try:
            about = self.file.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"Cannot read the query bank {self.file}: {error.strerror or error}.") from error
        return about.st_mtime_ns, about.st_ino, about.st_size

    def load(self) -> QueryBank | None:
        """The bank that is kept, complete or not; None where there is none.

        Raises
        ------
        ConfigError
            If the file cannot be read, is broken, or is of other weights. It stays as it is.
        """
        if self.changed() is None:
            return None
        try:
            bank = QueryBank.load(self.file)
        except ConfigError as error:
            raise self.refusal(str(error)) from error
        expected = self.model.record()
        differs = [name for name in reversed(expected) if bank.record.get(name) != expected[name]]
        if differs:
            name = differs[0]
            raise self.refusal(
                f"{self.file} is a query bank of another model: its {name} is {bank.record.get(name)!r}, and that of "
                f"this model is {expected[name]!r}."
            )
        return bank

    def refusal(self, reason: str) -> ConfigError:
        """The error for a file that cannot be used, for a reason in whole sentences."""
        return ConfigError(
            f"The folder of kept query banks cannot be used. {reason} Move the file {self.file} away to collect a bank "
            "anew, or name another folder."
        )

    def save(self, bank: QueryBank) -> None:
        """Keep a bank, complete at once.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        try:
            bank.save(self.file)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"Cannot write the query bank {self.file}: {reason}.") from error

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
