# SPDX-License-Identifier: Apache-2.0
"""Help and errors show what was written, brackets too; choices are shown, and completed by the shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_before_torch import ENVIRONMENT
from typer.main import get_command
from typer.testing import CliRunner

from plphp.cli import app
from plphp.inputs.sources import DTYPES
from plphp.methods.registry import METHODS_BY_NAME, available_methods
from plphp.settings.config import DECODE_MODES

FRAMES = re.compile(r"[\s│╭╮╰╯─]+")


def commands() -> dict[str, Any]:
    return {"": get_command(app), **get_command(app).commands}  # type: ignore[attr-defined]


def shown(command: str) -> str:
    """The help of a command without blanks and frames."""
    arguments = [command, "--help"] if command else ["--help"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "240"})
    assert done.exit_code == 0
    return FRAMES.sub("", done.stdout)


def written(text: str) -> str:
    """A help text as it was written, before what rich would take for markup was marked."""
    return FRAMES.sub("", text.replace("\\[", "["))


@pytest.mark.parametrize("name", commands())
def test_help_shows_every_text_as_it_is_written(name: str) -> None:
    command, page = commands()[name], shown(name)
    assert FRAMES.sub("", command.help.split("\n\n")[0]) in page
    for parameter in command.params:
        if parameter.help is not None:
            assert written(parameter.help) in page, parameter.name


def test_brackets_are_among_them() -> None:
    assert '{"images":[paths],"question":text}' in shown("calibrate")


def choices() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    methods = tuple(METHODS_BY_NAME.file_names())
    for name, command in commands().items():
        for parameter in command.params:
            known = {"method": methods, "dtype": DTYPES, "decode": DECODE_MODES}.get(parameter.name)
            if known is not None and name != "eval":
                yield name, parameter.name, known


def _id(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("command", "name", "known"), list(choices()), ids=_id)
def test_choices_are_shown_and_completed(command: str, name: str, known: tuple[str, ...]) -> None:
    (parameter,) = (parameter for parameter in commands()[command].params if parameter.name == name)
    assert {item.value for item in parameter.shell_complete(None, "")} >= set(known)
    assert [item.value for item in parameter.shell_complete(None, known[-1])] == [known[-1]]
    if (command, name) != ("calibrate", "method"):  # takes few of them
        assert all(value in parameter.help for value in known)


def test_there_are_choices() -> None:
    assert {("generate", "method"), ("generate", "dtype"), ("generate", "decode"), ("serve", "method")} <= {
        (command, name) for command, name, _ in choices()
    }


def test_names_of_methods_are_known_without_importing_them() -> None:
    assert sorted(METHODS_BY_NAME.file_names()) == sorted(available_methods())
    assert set(METHODS_BY_NAME.names()) >= set(METHODS_BY_NAME.file_names())


def complete(words: str, path: Path | None = None) -> list[str]:
    """What bash is offered behind some words; torch cannot be imported meanwhile."""
    environment = ENVIRONMENT | {
        "_PLPHP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - (not words.endswith(" "))),
    }
    if path is not None:
        environment["PYTHONPATH"] += os.pathsep + str(path)
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from plphp.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_methods_and_dtypes() -> None:
    assert {"calibrate", "collect"} <= set(complete("plphp c")) < {*commands()}
    assert complete("plphp generate --method snap") == ["snapkv", "snapkv_vision"]
    assert complete("plphp profile --dtype bf") == ["bfloat16"]
    assert complete("plphp eval --methods plphp,snapkv_") == ["plphp,snapkv_vision"]
    assert "H100" in complete("plphp estimate --gpu H")


def test_bash_completes_methods_of_installed_packages_which_are_not_imported(tmp_path: Path) -> None:
    installed = tmp_path / "theirs-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[plphp.methods]\ntheirs_one = no_such_module:METHOD\n")
    assert complete("plphp generate --method theirs", tmp_path) == ["theirs_one"]


@pytest.mark.parametrize("name", ["[bold]plhp[/bold]", "[red]", "[/]", "plphp[plots]", "x" * 5000, "two  blanks"])
def test_errors_show_a_users_text_whole(name: str) -> None:
    done = CliRunner().invoke(app, ["generate", "--method", name, "--prompt", "a"], env={"COLUMNS": "40"})
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: Unknown method {name!r}.")


def test_doctor_shows_a_models_name_whole_and_ends_with_a_verdict(tmp_path: Path) -> None:
    folder = tmp_path / "[red]model[plots]"
    done = CliRunner().invoke(app, ["doctor", "--model", str(folder)], env={"COLUMNS": "400"})
    assert done.exit_code == 1
    verdict = done.stdout.splitlines()[-1]
    assert verdict == f"plphp cannot be used with {folder}: There is no model folder {str(folder)!r}."
    assert done.stdout.count(str(folder)) >= 2
