# SPDX-License-Identifier: Apache-2.0
"""Settings as a folder in the hub's layout, with the query banks that they name in files of this machine."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from plphp.errors import ConfigError, LoadError
from plphp.io.card import Card
from plphp.io.hub import file_of, is_hub_id
from plphp.io.hub_folder import HubFolder

from .toml_text import toml_text

HEAD = (
    "# Settings of plphp: PLPHPConfig.from_pretrained reads the folder, `plphp generate --config-file` this file.\n\n"
)
BANK_FILE = "bank.safetensors"
"""Name of a query bank in a folder; `plphp.QueryBank` has the same."""
BUNDLED = "bundled"
"""Name of the bank of the bundled model."""
BESIDE = "./"
"""Begins the name of a file that stands in the same folder."""
USE = """\
import plphp

config = plphp.PLPHPConfig.from_pretrained({source})
with plphp.prune(model, config) as run:
    output = model.generate(**inputs)"""


class HubSettings(HubFolder):
    """Settings with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

    HUB_FILE: ClassVar[str] = "plphp.toml"
    HUB_CONTENT: ClassVar[str] = "settings"

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-ready values."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings of such values."""

    @classmethod
    @abstractmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Settings of a file."""

    def _write_into(self, folder: Path) -> None:
        copies: dict[str, str] = {}
        values = _with_banks(self.to_dict(), lambda name: _carried(name, folder, copies))
        (folder / self.HUB_FILE).write_text(toml_text(HEAD, {"plphp": values}), encoding="utf-8")

    @classmethod
    def _read_from(cls, source: str | Path, file: Path, download: Mapping[str, Any]) -> Self:
        config = cls.from_toml(file)
        return cls.from_dict(_with_banks(config.to_dict(), lambda name: _located(name, source, download)))

    def _card(self, model: str, data: str) -> Card:
        values = self.to_dict()
        methods = [part["method"] for part in (*values["earlier"], values)]
        own = ", ".join(f"`{name}={value}`" for name, value in _changed(type(self).from_dict({}).to_dict(), values))
        facts = {"method": " + ".join(f"`{name}`" for name in methods), "settings": own, "model": model}
        return Card(
            title=f"Settings of plphp{f' for {model}' if model else ''}",
            about="How the vision tokens in the KV cache of a vision-language model are pruned, or held in few bits.",
            facts={**facts, "chosen on": data},
            use=USE,
            model=model,
        )


def _with_banks(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Settings as `HubSettings.to_dict` has them with other names of query banks, also of earlier methods."""
    if values["options"].get("folder"):
        raise ConfigError(
            f"The settings keep query banks in the folder {values['options']['folder']!r} of this machine: leave out "
            "folder, or name a bank."
        )
    options = {name: change(value) if name == "bank" and value else value for name, value in values["options"].items()}
    books = values["books"] and change(values["books"])
    earlier = [_with_banks(part, change) for part in values["earlier"]]
    return {**values, "options": options, "books": books, "earlier": earlier}


def _carried(name: str, folder: Path, copies: dict[str, str]) -> str:
    """What settings in a folder call a bank: a file of this machine is copied there, once."""
    if name == BUNDLED or is_hub_id(name):
        return name
    if name not in copies:
        file = BANK_FILE if not copies else f"bank-{len(copies) + 1}.safetensors"
        try:
            bank = Path(name)  # or a folder, as `QueryBank.save_pretrained` writes it
            shutil.copyfile(bank / BANK_FILE if bank.is_dir() else bank, folder / file)
        except shutil.SameFileError:  # the settings were read from this folder
            pass
        except OSError as error:
            raise LoadError(f"Cannot read the query bank {name}: {error.strerror or error}.") from error
        copies[name] = BESIDE + file
    return copies[name]


def _located(name: str, source: str | Path, download: Mapping[str, Any]) -> str:
    """Where a bank is that settings of a folder or a repository name."""
    if not name.startswith(BESIDE):
        return name
    file = name.removeprefix(BESIDE)
    if Path(file).name != file:
        raise ConfigError(f"The settings of {source} name {name!r}, which is not a file beside them.")
    return str(file_of(source, file, "query banks", **download))


def _changed(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings and options that are not at their defaults, without the methods of a chain."""
    own = {name: value for name, value in values.items() if name not in ("method", "options", "earlier")}
    return [*((name, value) for name, value in own.items() if value != defaults[name]), *values["options"].items()]
