# SPDX-License-Identifier: Apache-2.0
"""Run ``plphp`` in the process of the tests, and expect that it succeeds or that it names a user's mistake."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from plphp.cli import app


def run(*arguments: object, lines: str | None = None) -> Result:
    """Run a command line, with lines on standard input."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=lines)


def ok(*arguments: object, lines: str | None = None) -> str:
    """What a command that succeeds prints on standard output."""
    result = run(*arguments, lines=lines)
    assert result.exit_code == 0, result.output
    return result.stdout


def error(*arguments: object) -> str:
    """The line on standard error that a user's mistake ends with; nothing is printed on standard output."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line
