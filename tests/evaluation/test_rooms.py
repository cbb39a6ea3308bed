# SPDX-License-Identifier: Apache-2.0
"""The order of the evaluation's rooms: tasks know neither results nor running, results do not know running."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import plphp.evaluation

FOLDER = Path(plphp.evaluation.__file__).parent
ORDER = ("tasks", "settings", "results", "running")


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, also inside functions."""
    package = ["plphp", "evaluation", *file.relative_to(FOLDER).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*parent, *filter(None, [node.module])])


@pytest.mark.parametrize("room", ORDER)
def test_a_room_knows_only_those_before_it(room: str) -> None:
    files = [*(FOLDER / room).rglob("*.py"), *FOLDER.glob(f"{room}.py")]
    assert files
    known = ORDER[: ORDER.index(room) + 1]
    for file in files:
        rooms = {name.split(".")[2] for name in imported(file) if name.startswith("plphp.evaluation.")}
        assert rooms <= {*known}, file
