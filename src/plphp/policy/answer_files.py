# SPDX-License-Identifier: Apache-2.0
"""The files of answers that stand beside a query bank which does not hold them yet."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from plphp.errors import ConfigError


@dataclass(frozen=True)
class AnswerFiles:
    """Their names say which answer of the bank each is: ``<name of the bank>.answer-<number>.safetensors``.

    Parameters
    ----------
    bank : Path
        File of the bank.
    """

    bank: Path

    def of(self, number: int) -> Path:
        """The file of an answer, whether there is one or not."""
        return self.bank.with_name(f"{self.bank.stem}.answer-{number:04d}.safetensors")

    def pattern(self) -> str:
        """What a shell calls all of them."""
        return f"{self.bank.with_suffix('')}.answer-*"

    def there(self, behind: int = 0) -> dict[int, Path]:
        """Those that there are behind a number, by their numbers in rising order.

        Raises
        ------
        ConfigError
            If the folder cannot be read.
        """
        name = re.compile(re.escape(self.bank.stem) + r"\.answer-(\d{4,})\.safetensors")
        try:
            found = [match for match in map(name.fullmatch, os.listdir(self.bank.parent)) if match is not None]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            folder, reason = self.bank.parent, error.strerror or error
            raise ConfigError(f"Cannot read the folder {folder} of query banks: {reason}.") from error
        numbers = sorted(int(match[1]) for match in found)
        return {number: self.of(number) for number in numbers if number > behind}

    def forget(self, last: int) -> None:
        """Delete those up to a number, which the bank holds; what cannot be deleted stays."""
        for number, file in self.there().items():
            if number <= last:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
