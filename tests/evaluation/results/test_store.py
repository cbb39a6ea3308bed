# SPDX-License-Identifier: Apache-2.0
"""Results that a crash cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plphp import LoadError
from plphp.evaluation.results.store import read_records, records_path


@pytest.mark.parametrize("kept", ['{"index": 1, "answer": "é'.encode()[:-1], b"\0\0\0", b'{"index"'], ids=str)
def test_a_last_line_that_was_cut_off_is_named(kept: bytes, tmp_path: Path) -> None:
    """Also inside a character, as answers are written in UTF-8."""
    path = records_path(tmp_path, "mine")
    path.parent.mkdir()
    whole = json.dumps({"index": 0, "outcomes": {}}).encode() + b"\n"
    path.write_bytes(whole + kept)
    with pytest.raises(LoadError, match=r"mine\.jsonl, line 2 is broken .*: remove the line"):
        read_records(tmp_path, "mine")
    path.write_bytes(whole)
    assert [record["index"] for record in read_records(tmp_path, "mine")] == [0]
