# SPDX-License-Identifier: Apache-2.0
"""Messages repeat what the user gave, but no whole image that is written out as text."""

from __future__ import annotations

import base64
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp.io.quoting import LONGEST, SHOWN, cut, one_line, quoted, shortened

ENCODED = base64.b64encode(bytes(range(256)) * 2).decode()
URI = f"data:image/png;base64,{ENCODED}"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(st.text(min_size=SHOWN + 1), st.lists(st.sampled_from(["list", "dict", "tuple"]), max_size=3))
def test_a_long_text_is_cut_at_any_depth(text: str, around: list[str]) -> None:
    value: object = text
    for kind in around:
        value = {"list": [value], "dict": {"image": value}, "tuple": (1, value)}[kind]
    said = quoted(value)
    assert repr(text)[1:-1] not in said
    assert f"({len(text):,} characters)" in said
    assert repr(text[:SHOWN])[:-1] in said


@given(JSON)
def test_a_quote_is_one_short_line(value: object) -> None:
    assert len(quoted(value).splitlines()) == 1
    assert len(quoted([value] * 8)) <= LONGEST
    if isinstance(value, str) and len(value) <= SHOWN:
        assert quoted(value) == repr(value)


def test_bytes_and_objects_are_cut_too() -> None:
    assert quoted(b"a" * 5000).endswith("(5,000 bytes)")
    assert len(quoted(type("Wide", (), {"__repr__": lambda self: "line\n" * 500})())) <= 110
    assert "\n" not in quoted(type("Wide", (), {"__repr__": lambda self: "line\n" * 5})())


@given(st.binary(min_size=60), st.text(alphabet="abc ", max_size=20))
def test_a_data_uri_in_a_text_is_cut(content: bytes, before: str) -> None:
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    said = shortened(f"{before} {uri} stays")
    assert said == f"{before} {uri[:SHOWN]}... ({len(uri):,} characters) stays"


@pytest.mark.parametrize(
    "text",
    [
        ENCODED,
        f"cannot open {ENCODED!r}",
        "data:image/png;base64,\n" + "\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76)),
        "DATA:IMAGE/PNG;BASE64," + ENCODED,
        f"image/png;base64,{ENCODED}",  # the scheme forgotten
    ],
)
def test_encoded_texts_are_cut_in_messages_of_others(text: str) -> None:
    said = one_line(OSError(36, "File name too long", text), limit=10_000)
    assert ENCODED[60:120] not in said
    assert "characters)" in said


@pytest.mark.parametrize("text", ["a.png", "/home/" + "folder/" * 20 + "a.png", "data: none", "What is this?", ""])
def test_other_texts_stay(text: str) -> None:
    assert shortened(text) == text


def test_cut() -> None:
    assert cut("a" * SHOWN) == "a" * SHOWN
    assert cut(URI) == f"{URI[:SHOWN]}... ({len(URI):,} characters)"
    assert os.linesep not in cut(URI)


def test_what_is_cut_is_not_cut_again() -> None:
    once = f"The image {cut('data:image/png;base64,' + 'iVBORw0KGgo' * 20)} is broken"
    assert shortened(once) == once
