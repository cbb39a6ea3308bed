# SPDX-License-Identifier: Apache-2.0
"""``plphp serve``, as far as it goes without vLLM; tests/vllm runs the server."""

from __future__ import annotations

import importlib.util

import pytest
from typer.testing import CliRunner

from plphp.cli import app


def error(*arguments: str) -> str:
    """The one line that a user's mistake ends with."""
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.skipif(importlib.util.find_spec("vllm.config") is not None, reason="vLLM is installed")
def test_vllm_is_missing() -> None:
    assert "plphp serve needs vLLM" in error("model", "--port", "8000")


def test_settings_are_read_first() -> None:
    assert "contradict each other" in error("model", "--method", "plphp", "--config", "plphp")
    assert "Unknown setting 'retention'" in error("model", "--config", "plphp:retention=0.4")
