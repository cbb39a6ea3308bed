# SPDX-License-Identifier: Apache-2.0
"""The card of a folder in the hub's layout: a README with what it holds, of which model, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError

from .hub import is_hub_id
from .json_files import describe, read_json

MARK = "<!-- This card is written by plphp; one without this line is left as it is. -->"
TAGS = ("plphp", "kv-cache", "vision-language-model")
EVALUATION = "figures of `plphp eval`"
"""What `plphp.io.json_files.describe` says of a file of measured figures."""
METRICS = "metrics.json"
"""File with the figures in a folder of ``plphp eval``."""

Rows = Mapping[str, Mapping[str, Any]]
"""By the name of a row, values by the name of their column."""


@dataclass(frozen=True)
class Card:
    """What a card says.

    Parameters
    ----------
    title : str
        Its heading.
    about : str
        What the folder holds, in Markdown.
    facts : mapping of str to str
        The model and how the content was made, by what they are called; what is empty is left out.
    use : str
        Python code, with ``{source}`` where the folder or the repository is named.
    model : str
        Hub id of the model; anything else is not linked.
    figures : mapping
        Of `measured_rows`; empty where nothing was measured.
    """

    title: str
    about: str
    facts: Mapping[str, str]
    use: str
    model: str = ""
    figures: Rows = field(default_factory=dict)

    def measured(self, figures: Rows) -> Card:
        """Return the same card with figures."""
        return replace(self, figures=figures)

    def text(self, source: str) -> str:
        """Return the card of a folder or a repository as Markdown, with the metadata that the hub reads."""
        from huggingface_hub import ModelCardData

        base = self.model if is_hub_id(self.model) else None
        metadata = ModelCardData(library_name="plphp", base_model=base, tags=list(TAGS)).to_yaml()
        facts = {name: {"": value} for name, value in self.facts.items() if value}
        measured = table(self.figures) if self.figures else "No figures were given for this card."
        parts = (
            *(f"---\n{metadata}\n---", MARK, f"# {self.title}", self.about, table(facts)),
            *(f"## Use\n\n```python\n{self.use.format(source=json.dumps(source))}\n```", f"## Measured\n\n{measured}"),
        )
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, source: str) -> None:
        """Write the card into a folder, unless there is one that plphp has not written."""
        path = folder / "README.md"
        if not path.exists() or MARK in path.read_text(encoding="utf-8"):
            path.write_text(self.text(source), encoding="utf-8")


def measured_rows(figures: Mapping[str, Any] | str | Path | None) -> Rows:
    """Return measured figures as the rows of a table.

    Parameters
    ----------
    figures : mapping, str or Path, optional
        Values by name, or for each name values by column; or a JSON file of such, or the folder or the
        ``metrics.json`` of a run of ``plphp eval``, of which the table has a row per method.

    Raises
    ------
    LoadError
        If the file cannot be read.
    ConfigError
        If it holds something else.
    """
    if figures is None:
        return {}
    if isinstance(figures, Mapping):
        values, where = figures, "figures"
    else:
        path = Path(figures)
        path, where = (path / METRICS if path.is_dir() else path), f"The file of figures {figures}"
        values = read_json(path, "figures")
        if describe(values) == EVALUATION:
            return _of_evaluation(values)
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(f"{where} must hold figures by name, got {type(values).__name__}.")
    rows = {str(name): value if isinstance(value, Mapping) else {"": value} for name, value in values.items()}
    nested = [name for name, row in rows.items() if any(isinstance(value, (Mapping, list)) for value in row.values())]
    if nested:
        raise ConfigError(
            f"{where} must hold values, or rows of values, by name; {nested[0]!r} holds tables of tables."
        )
    return rows


def _of_evaluation(values: Mapping[str, Any]) -> Rows:
    """The score of each method in each group, and the share of the bytes that it holds."""
    groups: dict[str, Any] = {**values["groups"], "overall": values["overall"]}
    rows: dict[str, dict[str, Any]] = {}
    for variant in (variant["name"] for variant in values["variants"]):
        own = {name: group["variants"][variant] for name, group in groups.items() if variant in group["variants"]}
        scores = {name.replace("_", " "): figure["score"]["mean"] for name, figure in own.items() if "score" in figure}
        held = own.get("overall", {}).get("kept")
        rows[variant] = {**scores, **({} if held is None else {"share of vision KV held": held})}
    return rows


def table(rows: Rows) -> str:
    """Return rows as a table in Markdown, whose first column has their names."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines: list[Sequence[str]] = [("", *columns), ("---",) * (len(columns) + 1)]
    lines += [(name, *(_cell(row.get(column)) for column in columns)) for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
