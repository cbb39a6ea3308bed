# SPDX-License-Identifier: Apache-2.0
"""A sample of the queries with which a model wrote answers, to ask new prompts what an answer will look at."""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from plphp.errors import ConfigError
from plphp.io.hub import file_of, is_hub_id
from plphp.kernels.books import LayerBooks

from .bank_books import book_tensors, books_in, sample_in, sample_tensors
from .bank_checks import check_kinds, check_queries
from .entry_sampling import EntrySample
from .hub_bank import HubBank
from .rotation import Rotation

FORMAT = "plphp query bank 1"
BUNDLED = Path(__file__).parents[1] / "reference_model" / "query_bank" / "bank.safetensors"
"""Bank of the bundled model, which the name ``bundled`` stands for."""
VALUES_HASH = "weights_values_sha256"
"""Where the record of a bank has the hash of the values of the weights that wrote it: the same in every dtype that a
checkpoint is read in, which ``weights_sha256`` is not, and of weights in memory, which no server has as they were."""
_ADVICE = "Make it with plphp collect or plphp.collect_query_bank."


@dataclass(frozen=True)
class LayerBank:
    """Queries of a layer, rotated back to position 0.

    Positions count the tokens of a row from 0, ahead by ``rope_deltas`` with m-RoPE. A model that counts from another
    number (PaliGemma: 1) has its queries rotated by a constant here, and the same constant is missing when they are
    rotated on, so that it cancels.

    Parameters
    ----------
    queries : Tensor
        float [q_heads, samples, dim].
    rotation : Rotation
        That of the layer.
    """

    queries: Tensor = field(repr=False)
    rotation: Rotation

    def check(self, q_heads: int, dim: int) -> None:
        """Raise `ConfigError` unless the bank is of a model with these query heads and this dimension."""
        if (self.queries.shape[0], self.queries.shape[2]) != (q_heads, dim):
            raise ConfigError(
                f"The query bank is of {self.queries.shape[0]} query heads of dimension {self.queries.shape[2]}, and "
                f"this model has {q_heads} of dimension {dim}: collect one with this model."
            )

    def at(self, position: Tensor, q_heads: int, dim: int) -> Tensor:
        """The queries as they would be at other positions.

        Parameters
        ----------
        position : Tensor
            int64 [batch, samples]; rotary position of each query.
        q_heads, dim : int
            Query heads of the model's layer, and their dimension.

        Returns
        -------
        Tensor
            float32 [batch, q_heads, samples, dim], on the device of ``position``.

        Raises
        ------
        ConfigError
            If the bank is of a model with other heads.
        """
        self.check(q_heads, dim)
        queries = self.queries.to(position.device).expand(len(position), -1, -1, -1)
        return self.rotation.rotated(queries, position[:, None])


@dataclass(frozen=True)
class QueryBank(HubBank):
    """Queries of answers, see `plphp.collect_query_bank`.

    Parameters
    ----------
    layers : mapping of int to LayerBank
        By decoder layer; full-attention layers only.
    ahead : Tensor
        int64 [samples]; how many tokens after the prompt each query came.
    record : mapping
        JSON-ready: the model and how the bank was made; ``decoder_layers`` among it.
    books : mapping of int to LayerBooks, optional
        Codebooks of each layer, learned from the same prompts; None where there are none, as in the files of earlier
        versions and of models whose heads have a number of channels that 8 does not divide.
    sampled : EntrySample, optional
        The vision entries that codebooks will be learned from, while a bank that collects itself is not complete.
    """

    layers: Mapping[int, LayerBank] = field(repr=False)
    ahead: Tensor = field(repr=False)
    record: Mapping[str, Any]
    books: Mapping[int, LayerBooks] | None = field(default=None, repr=False)
    sampled: EntrySample | None = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> QueryBank:
        return self  # nothing in it changes, and copies of a cache ask with the same bank

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with the queries in bfloat16 and the codebooks in float16."""
        tensors, interleaved = {"ahead": self.ahead}, {}
        for number, layer in self.layers.items():
            tensors[f"{number}.queries"] = layer.queries.to(torch.bfloat16).contiguous()
            tensors[f"{number}.frequencies"] = layer.rotation.frequencies.clone()
            interleaved[number] = layer.rotation.interleaved
        tensors.update({} if self.books is None else book_tensors(self.books))
        tensors.update({} if self.sampled is None else sample_tensors(self.sampled))
        about = {"format": FORMAT, "interleaved": json.dumps(interleaved), "record": json.dumps(dict(self.record))}
        path = Path(path)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # another process may save here as well
        try:
            part.write_bytes(save(tensors, metadata=about))  # save_file makes files that their owner alone can read
            part.replace(path)  # complete at once, also over a bank that is in use
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> QueryBank:
        """Read what `save` wrote.

        Raises
        ------
        ConfigError
            If it cannot be read, or is something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ConfigError(f"{path} does not hold a query bank. {_ADVICE}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except OSError as error:
            raise ConfigError(f"Cannot read the query bank {path}: {error.strerror or error}. {_ADVICE}") from error
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a safetensors file: {error}. {_ADVICE}") from error
        try:
            rotations, record = json.loads(about["interleaved"]), json.loads(about["record"])
            check_kinds(rotations, record)
            layers = {
                int(number): LayerBank(
                    tensors[f"{number}.queries"], Rotation(tensors[f"{number}.frequencies"], interleaved)
                )
                for number, interleaved in rotations.items()
            }
            parts = {number: (layer.queries, layer.rotation.frequencies) for number, layer in layers.items()}
            check_queries(parts, tensors["ahead"], record)
            queries = {number: layer.queries for number, layer in layers.items()}
            books, sampled = books_in(tensors, queries), sample_in(tensors, queries)
            return cls(layers, tensors["ahead"], record, books, sampled)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"The query bank {path} is broken ({error!r}). {_ADVICE}") from error

    def rounded(self) -> QueryBank:
        """The bank as a file would hold it."""
        layers = {n: LayerBank(layer.queries.to(torch.bfloat16), layer.rotation) for n, layer in self.layers.items()}
        return replace(self, layers=layers)

    def of(self, layer: int) -> LayerBank:
        """The queries of a layer.

        Raises
        ------
        ConfigError
            If there is none.
        """
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise ConfigError(f"The query bank is of the layers {known}, not of layer {layer}: collect one again.")
        return self.layers[layer]

    def check_rotations(self, rotations: Mapping[int, Rotation]) -> None:
        """Raise `ConfigError` unless a model turns its queries as the bank says, by decoder layer.

        The hash of the weights says nothing of the settings of a rotary embedding.
        """
        for layer, rotation in rotations.items():
            if not self.of(layer).rotation.is_like(rotation):
                raise ConfigError(
                    f"The query bank is of a model that turns the queries of layer {layer} otherwise: use the rotary "
                    "settings that it was collected with, or name another folder."
                )

    @property
    def decoder_layers(self) -> int:
        """Decoder layers of the model that the bank is of."""
        layers: int = self.record["decoder_layers"]
        return layers

    @property
    def values_hash(self) -> str:
        """Hash of the weights of the model that the bank is of, see `VALUES_HASH`; "" where the bank does not say."""
        return str(self.record.get(VALUES_HASH, ""))


def bank_file(name: str) -> Path:
    """The file that the option ``bank`` names: a path, a folder or a repository in the hub's layout, or ``bundled``.

    Raises
    ------
    LoadError
        If there is no bank in the folder or the repository.
    """
    if name == "bundled":
        return BUNDLED
    if is_hub_id(name):
        return _downloaded(name)
    return file_of(name, QueryBank.HUB_FILE, QueryBank.HUB_CONTENT) if Path(name).is_dir() else Path(name)


def bank_at(name: str) -> QueryBank:
    """The bank of a file, see `bank_file`. It is read again only when it has changed.

    Raises
    ------
    ConfigError
        See `QueryBank.load`.
    LoadError
        See `bank_file`.
    """
    path = bank_file(name)
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError as error:
        raise ConfigError(f"Cannot read the query bank {path}: {error.strerror or error}. {_ADVICE}") from error
    return _read(os.path.abspath(path), changed)


@functools.lru_cache
def _downloaded(name: str) -> Path:
    """The file of a repository, for which the hub is asked once: a bank is looked at in every layer."""
    return file_of(name, QueryBank.HUB_FILE, QueryBank.HUB_CONTENT)


def check_depth(name: str, layers: int) -> None:
    """Raise `ConfigError` unless the bank of a file is of a model with so many decoder layers."""
    of_bank = bank_at(name).decoder_layers
    if of_bank != layers:
        raise ConfigError(
            f"The query bank {name} is of a model with {of_bank} decoder layers, and this one has {layers}: collect "
            "one with this model."
        )


@functools.lru_cache(maxsize=4)
def _read(path: str, changed: int) -> QueryBank:
    return QueryBank.load(path)
