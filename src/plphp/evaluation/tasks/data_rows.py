# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set that the ``datasets`` library loads, as samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plphp.errors import BackendUnavailableError, ConfigError, LoadError, did_you_mean
from plphp.io.quoting import one_line

from .data_entry import Entry, open_images, read_turns
from .data_lines import METADATA
from .task import Sample

COLUMNS = {"image": "image", "question": "question", "answer": "answer", "split": "test", "name": "", "group": ""}
"""Options of a data set, with their defaults."""


@dataclass(frozen=True)
class _Table:
    """A loaded data set with what its rows are read by."""

    name: str
    options: Mapping[str, str]
    texts: Any
    images: Any
    folder: Path | None
    allow_urls: bool


def read_rows(source: str, allow_urls: bool) -> tuple[str, list[Entry]]:
    """Load a data set; images are decoded when a sample is made.

    Parameters
    ----------
    source : str
        What ``datasets.load_dataset`` takes, with options, as in ``"lmms-lab/ChartQA:split=test,question=query"``.
    allow_urls : bool
        Whether http and https addresses of images may be fetched.

    Returns
    -------
    (str, list of Entry)
        The name of the data set without its options, and a sample for each row.

    Raises
    ------
    ConfigError
        If an option or a column is unknown.
    LoadError
        If the data set cannot be loaded, or a text of a row is missing.
    BackendUnavailableError
        If the ``datasets`` library is not installed.
    """
    name, options = _options(source)
    data = _load(_library(name, source), name, options)
    _check_columns(data.column_names, name, options)
    table = _Table(
        name=name,
        options=options,
        # Texts alone, so that reading them decodes no image; and images as they are stored, so that plphp decodes them.
        texts=data.select_columns([options[key] for key in ("question", "answer", "group") if options[key]]),
        images=data.select_columns([options["image"]]).with_format("arrow"),
        folder=_folder_of(name),
        allow_urls=allow_urls,
    )
    return name, [_entry(table, row) for row in range(len(data))]


def _options(source: str) -> tuple[str, dict[str, str]]:
    name, _, rest = source.partition(":")
    options = dict(COLUMNS)
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key not in options:
            raise ConfigError(f"Unknown option {part!r} of the data set {name!r}.{did_you_mean(key, COLUMNS)}")
        options[key] = value
    return name, options


def _library(name: str, source: str) -> Any:
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        if Path(name).suffix == ".jsonl" or name.startswith(("/", ".", "~")):
            raise LoadError(
                f"{source} is neither a .jsonl file nor a folder with {METADATA}; for anything else the `datasets` "
                "library is needed (pip install 'plphp[eval]')."
            ) from error
        raise BackendUnavailableError(
            f"Reading the data set {name!r} needs the `datasets` library: pip install 'plphp[eval]'. A .jsonl file or "
            f"a folder with {METADATA} needs nothing more."
        ) from error
    return datasets


def _load(library: Any, name: str, options: Mapping[str, str]) -> Any:
    split = options["split"]
    try:
        if Path(name).is_file():
            # The library calls the whole of a single file its split "train".
            return library.load_dataset(Path(name).suffix.lstrip("."), data_files=name, split="train")
        if Path(name).is_dir():
            return library.load_dataset("imagefolder", data_dir=name, split=split)
        return library.load_dataset(name, options["name"] or None, split=split)
    except Exception as error:  # the library raises whatever its readers run into
        raise LoadError(f"Cannot load the data set {name!r}, split {split!r}: {one_line(error)}") from error


def _check_columns(columns: list[str], name: str, options: Mapping[str, str]) -> None:
    named = [options[key] for key in ("image", "question", "answer", "group") if options[key]]
    for column in named:
        if column not in columns:
            raise ConfigError(f"The data set {name!r} has no column {column!r}.{did_you_mean(column, columns)}")


def _folder_of(name: str) -> Path | None:
    """Where the relative paths of a data set start; None for a data set of the hub."""
    path = Path(name)
    return path if path.is_dir() else path.parent if path.is_file() else None


def _entry(table: _Table, row: int) -> Entry:
    origin, options = f"{table.name}, row {row}", table.options
    texts = table.texts[row]
    turns, accepted = read_turns({key: texts[options[key]] for key in ("question", "answer")}, origin)
    group = str(texts[options["group"]]) if options["group"] else ""

    def make() -> Sample:
        try:
            cell = table.images[row][options["image"]][0].as_py()
        except Exception as error:  # the library raises whatever its readers run into
            raise LoadError(f"{origin}: cannot read the image: {one_line(error)}") from error
        cells = cell if isinstance(cell, (list, tuple)) else [cell]
        images = open_images(cells, origin, folder=table.folder, allow_urls=table.allow_urls)
        if not images:
            raise LoadError(f"{origin}: no image in the column {options['image']!r}.")
        return Sample(f"{row}", table.name, images, turns, None, accepted)

    return Entry(group, make, len(accepted) > 1)
