# SPDX-License-Identifier: Apache-2.0
"""JSON and JSON Lines files as programs write them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp.errors import LoadError
from plphp.inputs.chat import read_chat
from plphp.io.json_files import read_json
from plphp.io.json_lines import read_entries

VALUES = st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.lists(st.text()), max_size=4)
BOM = b"\xef\xbb\xbf"


@given(
    st.lists(VALUES, min_size=1, max_size=5),
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r\n \r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_what_is_written_is_read(values: list[Any], end: bytes, mark: bool, ascii_only: bool, last: bool) -> None:
    """U+2028, U+0085 and their like inside a text are no line ends."""
    lines = [json.dumps(value, ensure_ascii=ascii_only).encode() for value in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(BOM * mark + end.join(lines) + end * last)
        entries = list(read_entries(path, "data"))
        assert [value for _, _, value in entries] == values
        step = end.count(b"\n")
        assert [entry[:2] for entry in entries] == [
            (number, f"{path}, line {number}") for number in range(1, 1 + step * len(values), step)
        ]
        path.write_bytes(BOM * mark + b" [" + b",\n".join(lines) + b"]" + end * last)
        assert [value for _, _, value in read_entries(path, "data")] == values
        assert next(read_entries(path, "data"))[:2] == (1, f"{path}, entry 1")


def test_byte_order_marks_between_joined_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM + b'{"a": "\xef\xbb\xbf"}\r\n' + BOM + b'{"b": 2}\r\n')
    assert [value for _, _, value in read_entries(path, "data")] == [{"a": "\ufeff"}, {"b": 2}]


def test_a_chat_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(BOM + b'[{"role": "user", "content": "a"}]')
    assert read_chat(path) == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": 1}\n\n{"a": }\n', r"a\.jsonl, line 3: not JSON: Expecting value"),
        (BOM + b"{", r"a\.jsonl, line 1: not JSON"),
        (b'{"a": "\r"}', r"a\.jsonl, line 1: not JSON"),
        (b"[1, ", r"The data .*a\.jsonl: neither JSON Lines nor a JSON list"),
        (b"1\n" + b"[" * 100_000, r"a\.jsonl, line 2: not JSON: maximum recursion"),
        (b"\xff\xfe{\x00", r"Cannot read the data .*a\.jsonl: not UTF-8 text"),  # what older Windows shells write
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=part):
        list(read_entries(path, "data"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"Cannot read the data .*none\.jsonl: No such file"):
        list(read_entries(tmp_path / "none.jsonl", "data"))
    with pytest.raises(LoadError, match=r"Cannot read the chat .*: Is a directory"):
        read_json(tmp_path, "chat")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(LoadError, match=r"The chat .*a\.json is not JSON"):
        read_json(tmp_path / "a.json", "chat")
