# SPDX-License-Identifier: Apache-2.0
"""Settings as TOML, which people read and change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w


def toml_text(head: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Write tables as TOML.

    Parameters
    ----------
    head : str
        What stands before them, as comments.
    tables : mapping of str to mapping
        Tables by name; nested mappings are tables under them.

    Returns
    -------
    str
        TOML without the values that are None, which TOML cannot write.
    """
    return head + tomli_w.dumps({name: _without_none(table) for name, table in tables.items()})


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tables without what is None, inside nested tables and lists of tables, too."""
    return {key: _table(value) for key, value in values.items() if value is not None}


def _table(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_none(value)
    return [_table(part) for part in value] if isinstance(value, (list, tuple)) else value
