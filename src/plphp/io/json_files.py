# SPDX-License-Identifier: Apache-2.0
"""The JSON files that plphp writes: read one of a kind, and say what the wrong one is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError

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
"""Keys by which a file is known, with what it is; the first that fits counts."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Parameters
    ----------
    name : str
        Such as "report".
    made_by : str
        What writes it, for messages.
    version : int
        Its "format".
    """

    name: str
    made_by: str
    version: int


def describe(values: object) -> str | None:
    """What a JSON value that plphp wrote is, such as "a profile of `plphp profile`"; None where it is not known."""
    if not isinstance(values, Mapping):
        return None
    return next((text for keys, text in KINDS if keys <= values.keys()), None)


def read_values(source: str | Path, kind: Kind) -> dict[str, Any]:
    """Read a JSON object of a kind from a file (a `Path`) or from JSON text (a `str`), and check its format.

    Returns
    -------
    dict
        Without the "format".

    Raises
    ------
    ConfigError
        If it cannot be read or is of another kind or format; the message says what it is and what writes the kind.
    """
    expected = f"expected what {kind.made_by} writes"
    try:
        values = json.loads(source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source)
    except OSError as error:
        raise ConfigError(f"Cannot read the {kind.name} {source}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, or no JSON
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
