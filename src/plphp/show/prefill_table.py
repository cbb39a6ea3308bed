# SPDX-License-Identifier: Apache-2.0
"""The form of the tables about prefill: words at the left, counts at the right, a sum below."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table


def prefill_table(title: str, caption: str, words: Iterable[str], counts: Iterable[str]) -> Table:
    """Return a table without rows, whose columns have these headings."""
    table = Table(title=title, caption=caption, caption_justify="left")
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in counts:
        table.add_column(heading, justify="right", overflow="fold")
    return table
