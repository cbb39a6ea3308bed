# SPDX-License-Identifier: Apache-2.0
"""JSON files of a kind: written and read back, and wrong files refused by what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plphp.errors import ConfigError, LoadError
from plphp.io.json_files import Kind, describe, from_json, read_json, to_json

NOTE = Kind("note", "`plphp note`", 3)
DEEP = "[" * 100_000


def total(values: dict[str, Any]) -> int:
    return sum(values["numbers"])


@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_written_is_read(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "note.json"
    text = to_json({"numbers": [1, 2]}, NOTE, path, indent)
    assert path.read_text() == text
    assert from_json(path, NOTE, total) == from_json(text, NOTE, total) == 3
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert from_json(path, NOTE, dict) == {"numbers": [1, 2]}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", r"note\.json is not a JSON note: .*; expected what `plphp note` writes\."),
        (b"\xff\xfe{", r"note\.json is not a JSON note: 'utf-8' codec"),
        (DEEP.encode(), r"note\.json is not a JSON note: maximum recursion"),
        (b'{"numbers": [1]}', r'note\.json is not a plphp note, which is an object with a "format"'),
        (b'{"format": 2, "numbers": [1]}', r"note\.json is a note of format 2, expected 3: make it again\."),
        (b'{"format": 3, "query_rows": 1, "layers": 1, "prompts": 1}', r"is a profile of `plphp profile`, and not a n"),
        (b'{"format": 3}', r"Not a plphp note: KeyError 'numbers'\."),
        (b'{"format": 3, "numbers": ["a"]}', r"Not a plphp note: TypeError unsupported operand"),
    ],
    ids=["broken", "no UTF-8", "deep", "no format", "older", "another kind", "a key is missing", "a wrong value"],
)
def test_wrong_files_are_named(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=part):
        from_json(path, NOTE, total)


def test_a_text_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Not a JSON note"):
        from_json(str(tmp_path / "note.json"), NOTE, total)
    with pytest.raises(ConfigError, match=r"Cannot read the note .*note\.json: No such file"):
        from_json(tmp_path / "note.json", NOTE, total)


@pytest.mark.parametrize("values", [None, 3, "report", ["format"], {}, {"format": 1}])
def test_what_plphp_did_not_write_has_no_description(values: object) -> None:
    assert describe(values) is None


def test_a_users_json_that_is_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(DEEP)
    with pytest.raises(LoadError, match=r"The chat .*chat\.json is not JSON: maximum recursion"):
        read_json(tmp_path / "chat.json", "chat")
