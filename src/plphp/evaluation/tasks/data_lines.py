# SPDX-License-Identifier: Apache-2.0
"""Lines of a JSON Lines file as samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from plphp.errors import LoadError, PLPHPError
from plphp.inputs.image_source import located_images
from plphp.io.json_lines import read_entries
from plphp.io.quoting import quoted

from .data_entry import Entry, open_images, read_turns
from .task import Sample

METADATA = "metadata.jsonl"
"""The file that makes a folder of images a data set."""


def read_lines(file: Path, allow_urls: bool) -> list[Entry]:
    """Read the samples of a file; images are located here and opened when a sample is made.

    Raises
    ------
    LoadError
        If a line is not as it has to be, or no image of the file can be reached: the folder is wrong, or addresses
        may not be fetched, and no sample could be scored.
    """
    entries = list(_entries(file, allow_urls))
    if entries and entries[0].error and all(entry.error for entry in entries):
        raise entries[0].error
    return entries


def _entries(file: Path, allow_urls: bool) -> Iterator[Entry]:
    for number, origin, values in read_entries(file, "data"):
        if not isinstance(values, dict):
            raise LoadError(
                f'{origin}: expected an object with "images", "question" and "answer", got {quoted(values)}.'
            )
        yield _entry(values, number, origin, file, allow_urls)


def _entry(values: Mapping[str, Any], number: int, origin: str, file: Path, allow_urls: bool) -> Entry:
    turns, accepted = read_turns(values, origin)
    group, several = str(values.get("group", "")), len(accepted) > 1
    try:
        images = located_images(values, folder=file.parent, allow_urls=allow_urls)
    except LoadError as error:
        # An image that is missing costs its own sample, when that is made, and not the whole file.
        return _unreadable(group, several, LoadError(f"{origin}: {error}"))
    except PLPHPError as error:
        raise LoadError(f"{origin}: {error}") from error
    if not images:
        raise LoadError(f'{origin}: "images" is missing or empty: a list of image files, relative to the file.')
    sample_id, system = str(values.get("id", f"{file.stem}-{number}")), values.get("system")

    def make() -> Sample:
        return Sample(sample_id, file.parent.name, open_images(images, origin), turns, system, accepted)

    return Entry(group, make, several)


def _unreadable(group: str, several: bool, error: LoadError) -> Entry:
    def make() -> Sample:
        raise error

    return Entry(group, make, several, error)
