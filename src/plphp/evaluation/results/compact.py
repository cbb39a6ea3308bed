# SPDX-License-Identifier: Apache-2.0
"""What to keep of a finished run: its figures with the command and the versions that gave them, in one JSON file."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plphp.errors import ConfigError, LoadError
from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.built_in import all_tasks

from .store import FORMAT, read_config, read_json, read_records, read_skipped, write_json
from .summary import summarize

OPTIONS = {"retention": "target_retention"}
"""Options of ``plphp eval`` that are not named like the setting."""
PER_TASK = ("score", "kept", "read")
"""What compact results hold of each task; of groups they hold everything."""


def compact_results(folder: str | Path, baseline: str | None = None) -> dict[str, Any]:
    """Figures of an evaluation with where they come from, and nothing per sample: what documents are made from.

    Parameters
    ----------
    folder : str or Path
        Folder of a finished evaluation.
    baseline : str, optional
        See `plphp.evaluation.summarize`.

    Raises
    ------
    LoadError
        If samples of the built-in tasks are missing.
    """
    config = read_config(Path(folder))
    missing = unfinished(folder)
    if missing:
        raise LoadError(f"{folder} is not finished: {missing}. Run the same command again: it goes on where it was.")
    about = {name: config[name] for name in ("date", "hardware", "versions", "model", "settings")}
    if config.get("collected_banks"):
        about["collected_banks"] = config["collected_banks"]
    figures = summarize(folder, baseline)
    for task in figures["tasks"].values():
        task["variants"] = {
            name: {measure: values[measure] for measure in PER_TASK if measure in values}
            for name, values in task["variants"].items()
        }
    return {"format": FORMAT, "command": command_of(config["settings"]), **about, **figures}


def unfinished(folder: str | Path) -> str:
    """Say which built-in tasks of an evaluation lack samples, as in "cell: 7 of 40"; empty where none does."""
    folder = Path(folder)
    config = read_config(folder)
    samples = config["settings"]["samples"]
    built_in = {task["name"] for task in config["tasks"]} & set(all_tasks())
    done = {name: len(read_records(folder, name)) + len(read_skipped(folder, name)) for name in sorted(built_in)}
    return ", ".join(f"{name}: {count} of {samples} samples" for name, count in done.items() if count < samples)


def command_of(settings: Mapping[str, Any]) -> str:
    """Return the command line that makes an evaluation with some settings; defaults are left out.

    Parameters
    ----------
    settings : mapping
        What `EvalSettings.to_dict` returned.
    """
    parts = ["plphp eval"]
    for field in dataclasses.fields(EvalSettings):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        if settings[field.name] != default:
            parts += _options(field.name, settings[field.name])
    return " ".join([*parts, "--out DIR"])


def _options(name: str, value: Any) -> list[str]:
    """What the command line says for a setting that is not the default."""
    if (name, value) == ("mode", "label-free"):
        return ["--label-free"]
    option = f"--{OPTIONS.get(name, name).replace('_', '-')}"
    if value is True:
        return [option]
    if name == "data":  # an option that is repeated, as its values may hold commas
        return [f"{option} {shlex.quote(source)}" for source in value]
    return [f"{option} {shlex.quote(','.join(map(str, value)) if isinstance(value, list) else str(value))}"]


def write_results(folder: str | Path, path: str | Path, baseline: str | None = None) -> None:
    """Write `compact_results` to a JSON file.

    Raises
    ------
    ConfigError
        If there is no such folder to write to.
    LoadError
        If the evaluation is not finished.
    """
    if not Path(path).parent.is_dir():
        raise ConfigError(f"There is no folder {Path(path).parent} to write the results to.")
    write_json(Path(path), compact_results(folder, baseline))


def read_results(path: str | Path) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises
    ------
    LoadError
        If there is no such file, or it holds something else.
    """
    return read_json(Path(path))
