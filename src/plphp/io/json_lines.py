# SPDX-License-Identifier: Apache-2.0
"""Read JSON Lines files as editors and programs write them, and say where a file is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plphp.errors import LoadError

from .json_files import parse_json, read_text


def read_entries(path: str | Path, what: str) -> Iterator[tuple[int, str, Any]]:
    """Read a JSON Lines file, or a JSON file that is a single list.

    Empty lines, a byte order mark and line ends of Windows are fine, and so are Unicode's further line separators
    inside a text.

    Parameters
    ----------
    path : str or Path
        The file, in UTF-8.
    what : str
        Content of the file, for messages: ``"prompts"``.

    Yields
    ------
    (int, str, object)
        The number of a value's line, or of the entry in a list, from 1; where it stands, for messages, as
        ``"FILE, line N"`` or ``"FILE, entry N"``; and the value.

    Raises
    ------
    LoadError
        If the file cannot be read, or a line is not JSON; the message names the line.
    """
    text = read_text(path, what)
    if text.lstrip().startswith("["):
        try:
            values = parse_json(text)
        except ValueError as error:
            raise LoadError(f"The {what} {path}: neither JSON Lines nor a JSON list ({error}).") from error
        yield from ((number, f"{path}, entry {number}", value) for number, value in enumerate(values, 1))
        return
    # Not splitlines, which breaks a text at U+2028 too. Files that were joined have byte order marks between them.
    for number, line in enumerate(text.replace("\n\ufeff", "\n").split("\n"), 1):
        if line.strip():
            try:
                value = parse_json(line)
            except ValueError as error:
                raise LoadError(f"{path}, line {number}: not JSON: {error}.") from error
            yield number, f"{path}, line {number}", value
