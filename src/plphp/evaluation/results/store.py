# SPDX-License-Identifier: Apache-2.0
"""The folder of an evaluation: its configuration, a line for every finished sample, and the figures.

::

    DIR/config.json                  settings, variants, model with a hash of its weights, versions, hardware, date
    DIR/predictions/<task>.jsonl     a line per finished sample, scored or skipped; lines are only ever added
    DIR/metrics.json                 the figures
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError, LoadError
from plphp.io.json_files import describe, parse_json
from plphp.io.quoting import one_line

FORMAT = 1
COMPARED = ("format", "settings", "variants", "query_banks", "contents", "model", "versions")
"""What has to be the same for a folder to be gone on with; date and hardware may differ."""
MAX_DIFFERENCES_SHOWN = 3
"""Differences between two configurations that a message names; it counts the rest."""


class Store:
    """The folder of an evaluation, which may be gone on with, also for more samples than were asked for before.

    Parameters
    ----------
    folder : Path
        Made if it is missing.
    config : mapping
        What the run is, JSON-ready.

    Raises
    ------
    ConfigError
        If the folder holds another evaluation; the message says what differs.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{folder} is a file: name a folder to write the results to.")
        (self.folder / "predictions").mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.json"
        if path.exists():
            self._continue(path, config)
        else:
            write_json(path, config)

    def _continue(self, path: Path, config: Mapping[str, Any]) -> None:
        before, now = read_config(self.folder), json.loads(json.dumps(config))
        # The first samples of a larger number are those of a smaller: that alone makes no other evaluation.
        more = now["settings"]["samples"] > before["settings"]["samples"]
        if more:
            before["settings"]["samples"] = now["settings"]["samples"]
        differences = _differences(before, now)
        if differences:
            shown, hidden = differences[:MAX_DIFFERENCES_SHOWN], len(differences) - MAX_DIFFERENCES_SHOWN
            raise ConfigError(
                f"{self.folder} holds another evaluation: {'; '.join([*shown, *_more(hidden)])}. Name another folder, "
                "or ask for the same again, or for more samples, to go on with it."
            )
        if more:
            write_json(path, before)

    def finished(self, task: str) -> set[int]:
        """Numbers of the samples of a task that are done: scored or skipped. A line that was cut off is removed."""
        path = self._path(task)
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                with path.open("r+b") as file:
                    file.truncate(whole)
        return {record["index"] for record in _read_lines(self.folder, task)}

    def add(self, task: str, record: Mapping[str, Any]) -> None:
        """Write down a finished sample at once."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._path(task).open("a", encoding="utf-8") as file:
            file.write(line)

    def _path(self, task: str) -> Path:
        return records_path(self.folder, task)


def records_path(folder: Path, task: str) -> Path:
    """The file of a task's finished samples."""
    return folder / "predictions" / f"{task}.jsonl"


def read_records(folder: Path, task: str) -> list[dict[str, Any]]:
    """Scored samples of a task, in the order of the samples; none where there is no file.

    Raises
    ------
    LoadError
        If a line is broken.
    """
    return [record for record in _read_lines(folder, task) if "outcomes" in record]


def read_skipped(folder: Path, task: str) -> list[dict[str, Any]]:
    """Skipped samples of a task as ``index``, ``id`` (None where the sample could not be read) and ``reason``.

    Raises
    ------
    LoadError
        If a line is broken.
    """
    return [
        {"index": record["index"], "id": record["id"], "reason": record["skipped"]}
        for record in _read_lines(folder, task)
        if "outcomes" not in record
    ]


def _read_lines(folder: Path, task: str) -> list[dict[str, Any]]:
    """What the newest line of each sample says, in the order of the samples."""
    path = records_path(folder, task)
    if not path.exists():
        return []
    records: dict[int, dict[str, Any]] = {}
    # Bytes, as a run that was killed may have left a line that ends inside a character.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line:
            try:
                record = parse_json(line)
                index, _ = record["index"], record["outcomes" if "skipped" not in record else "id"]
                records[index] = record
            except (ValueError, KeyError, TypeError) as error:
                raise LoadError(f"{path}, line {number} is broken ({one_line(error)}): remove the line.") from error
    return [records[index] for index in sorted(records)]


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an evaluation.

    Raises
    ------
    LoadError
        If the folder holds none, or only a part of it.
    """
    config = read_json(folder / "config.json")
    missing = sorted({"settings", "variants", "tasks", "refused"} - set(config))
    if missing:
        raise LoadError(f"{folder / 'config.json'} lacks {', '.join(missing)}: is it the folder of a run?")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of an evaluation.

    Raises
    ------
    LoadError
        If there is no such file, or it holds no JSON object of this version's format.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LoadError(f"Cannot read {path} ({error.strerror or error}): is it the folder of a run?") from error
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        what = describe(values)
        raise LoadError(
            f"{path} is {f'{what}, and ' if what else ''}not of an evaluation of this version's format ({FORMAT})."
        )
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, in words."""
    differences = []
    for key in COMPARED:
        old, new = before.get(key, {}), now.get(key, {})
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for name in dict.fromkeys([*old, *new]):
                if old.get(name) != new.get(name):
                    differences.append(f"{key}.{name} is {_short(old.get(name))} there and {_short(new.get(name))} now")
        elif old != new:
            differences.append(f"the {key} are not the same")
    return differences


def _more(count: int) -> list[str]:
    return [f"{count} more"] if count > 0 else []


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
