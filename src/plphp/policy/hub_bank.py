# SPDX-License-Identifier: Apache-2.0
"""A query bank as a folder in the hub's layout, with a card that says of which model it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from plphp.io.card import Card
from plphp.io.hub_folder import HubFolder

ABOUT = """\
Queries with which a vision-language model wrote answers to some prompts{books}.
The method `query_bank` of plphp asks new prompts with them what an answer will look at. They are of no use to other
weights: plphp compares the hash below with that of the model, refuses codebooks of others and warns of queries of
others."""
BOOKS = ", and codebooks of its vision entries"
USE = """\
import plphp

config = plphp.PLPHPConfig(method="query_bank", SETTINGS, options={{"bank": {source}}})
with plphp.prune(model, config) as run:
    output = model.generate(**inputs)"""


class HubBank(HubFolder):
    """A query bank with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

    HUB_FILE: ClassVar[str] = "bank.safetensors"
    HUB_CONTENT: ClassVar[str] = "a query bank"

    record: Mapping[str, Any]
    books: Any

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write a file."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file."""

    @property
    @abstractmethod
    def values_hash(self) -> str:
        """Hash of the weights of the model that the bank is of."""

    def _write_into(self, folder: Path) -> None:
        self.save(folder / self.HUB_FILE)

    @classmethod
    def _read_from(cls, source: str | Path, file: Path, download: Mapping[str, Any]) -> Self:
        return cls.load(file)

    def _card(self, model: str, data: str) -> Card:
        record = self.record
        model = model or _public(str(record.get("model", ""))) or str(record.get("model_type", ""))
        versions = ", ".join(f"{name} {record[name]}" for name in ("plphp", "transformers", "torch") if name in record)
        settings = "retention_rate=0.25" if self.books is None else 'tiers="t10"'
        return Card(
            title=f"Query bank of {model or 'a model'}",
            about=ABOUT.format(books="" if self.books is None else BOOKS),
            facts={
                "model": model,
                "class": str(record.get("model_class", "")),
                "decoder layers": str(record["decoder_layers"]),
                "SHA-256 of the values of its weights": self.values_hash,
                "dtype": str(record.get("dtype", "")),
                "collected from": data,
                "collected with": versions,
                "hardware": str(record.get("hardware", "")),
                "date": str(record.get("date", "")),
            },
            use=USE.replace("SETTINGS", settings),
            model=model,
        )


def _public(model: str) -> str:
    """The name of a model as others know it: of a folder of this machine its last part."""
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return Path(model).name if is_path else model
