# SPDX-License-Identifier: Apache-2.0
"""Read JSON and JSON Lines files as editors and programs write them, and say where a file is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plphp.errors import LoadError


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Parameters
    ----------
    path : str or Path
        The file, in UTF-8.
    what : str
        What it holds, for messages: ``"chat"``.

    Raises
    ------
    LoadError
        If it cannot be read or is not JSON.
    """
    try:
        return json.loads(_text(path, what))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"The {what} {path} is not JSON: {error}.") from error


def read_entries(path: str | Path, what: str) -> Iterator[tuple[int, str, Any]]:
    """Read a JSON Lines file, or a JSON file that is one list.

    Empty lines, a byte order mark, and line ends of Windows are fine, and so are Unicode's other line separators inside
    a text.

    Parameters
    ----------
    path : str or Path
        The file, in UTF-8.
    what : str
        What it holds, for messages: ``"prompts"``.

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
    text = _text(path, what)
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LoadError(f"The {what} {path}: neither JSON Lines nor a JSON list ({error}).") from error
        yield from ((number, f"{path}, entry {number}", value) for number, value in enumerate(values, 1))
        return
    # Not splitlines, which breaks a text at U+2028 too. Files that were joined have byte order marks between them.
    for number, line in enumerate(text.replace("\n\ufeff", "\n").split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LoadError(f"{path}, line {number}: not JSON: {error}.") from error
            yield number, f"{path}, line {number}", value


def _text(path: str | Path, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LoadError(f"Cannot read the {what} {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"Cannot read the {what} {path}: not UTF-8 text ({error}).") from error
