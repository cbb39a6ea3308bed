# SPDX-License-Identifier: Apache-2.0
"""JSON files: those of a user, and those that plphp writes, of which a wrong file is named by what it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from plphp.errors import ConfigError, LoadError

T = TypeVar("T")

WITHOUT_POSITIONS = "which leaves out the positions that were kept"
KINDS: tuple[tuple[set[str], str], ...] = (
    ({"answer", "tokens", "report"}, f"the output of `plphp generate --json`, {WITHOUT_POSITIONS}"),
    ({"unpruned", "pruned", "report"}, f"the output of `plphp generate --compare --json`, {WITHOUT_POSITIONS}"),
    ({"kv_bytes_full", "kv_reduction"}, f"the output of `plphp inspect --json`, {WITHOUT_POSITIONS}"),
    ({"kv_bytes_full", "prompts"}, "a report of `plphp generate --report`"),
    ({"unpruned", "pruned", "workload"}, "the output of `plphp estimate --json`"),
    ({"query_rows", "layers", "prompts"}, "a profile of `plphp profile`"),
    ({"files", "re_attention"}, "the output of `plphp profile --json`"),
    ({"calibration", "measured"}, "the output of `plphp calibrate --json`"),
    ({"tasks", "groups", "variants"}, "figures of `plphp eval`"),
    ({"tasks", "settings", "variants"}, "the configuration of a run of `plphp eval`"),
)
"""Keys that tell what a file is, and its description; the first entry whose keys are all there counts."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that plphp writes and reads.

    Parameters
    ----------
    name : str
        The kind in a word, such as "report".
    made_by : str
        The command that writes such files, for messages.
    version : int
        The "format" that such a file has to name.
    """

    name: str
    made_by: str
    version: int


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises
    ------
    ValueError
        If the text is no JSON or no UTF-8, or its lists are nested too deep to be parsed.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def read_text(path: str | Path, what: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Parameters
    ----------
    path : str or Path
        The file.
    what : str
        Content of the file, for messages: ``"chat"``.

    Raises
    ------
    LoadError
        If the file cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LoadError(f"Cannot read the {what} {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"Cannot read the {what} {path}: not UTF-8 text ({error}).") from error


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file of a user, in UTF-8, with or without a byte order mark.

    Parameters
    ----------
    path : str or Path
        The file.
    what : str
        Content of the file, for messages: ``"chat"``.

    Raises
    ------
    LoadError
        If the file cannot be read or is not JSON.
    """
    try:
        return parse_json(read_text(path, what))
    except ValueError as error:
        raise LoadError(f"The {what} {path} is not JSON: {error}.") from error


def describe(values: object) -> str | None:
    """Describe a JSON value that plphp wrote, such as "a profile of `plphp profile`"; None for an unknown value."""
    if not isinstance(values, Mapping):
        return None
    return next((text for keys, text in KINDS if keys <= values.keys()), None)


def to_json(values: Mapping[str, Any], kind: Kind, path: str | Path | None = None, indent: int | None = None) -> str:
    """Return an object of a kind as JSON text with its "format", and write the text to ``path`` if that is a file."""
    text = json.dumps({"format": kind.version, **values}, indent=indent)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def from_json(source: str | Path, kind: Kind, build: Callable[[dict[str, Any]], T]) -> T:
    """Read an object of a kind from a file (a `Path`) or from JSON text (a `str`).

    Parameters
    ----------
    source : str or Path
        JSON text, or the file that holds it.
    kind : Kind
        The kind of file to expect.
    build : callable
        Makes the object from the values of the file without the "format"; may raise the errors that values of a wrong
        shape cause: AttributeError, KeyError, TypeError or ValueError.

    Raises
    ------
    ConfigError
        If it cannot be read or is of another kind or format, or ``build`` fails; the message says what the file is and
        what writes the kind.
    """
    values = _values(source, kind)
    try:
        return build(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"Not a plphp {kind.name}: {type(error).__name__} {error}.") from error


def _values(source: str | Path, kind: Kind) -> dict[str, Any]:
    """The values of an object of a kind without its "format", which is checked."""
    expected = f"expected what {kind.made_by} writes"
    try:
        values = parse_json(source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source)
    except OSError as error:
        raise ConfigError(f"Cannot read the {kind.name} {source}: {error.strerror or error}.") from error
    except ValueError as error:  # no UTF-8, or no JSON
        name = f"{source} is not" if isinstance(source, Path) else "Not"
        raise ConfigError(f"{name} a JSON {kind.name}: {error}; {expected}.") from error
    where = f"{source} is" if isinstance(source, Path) else "This is"
    what = describe(values)
    if what is not None and kind.made_by not in what:
        raise ConfigError(f"{where} {what}, and not a {kind.name}: {expected}.")
    if not isinstance(values, dict) or "format" not in values:
        raise ConfigError(f'{where} not a plphp {kind.name}, which is an object with a "format": {expected}.')
    version = values.pop("format")
    if version != kind.version:
        raise ConfigError(f"{where} a {kind.name} of format {version}, expected {kind.version}: make it again.")
    return values
