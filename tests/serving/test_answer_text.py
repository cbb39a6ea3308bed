# SPDX-License-Identifier: Apache-2.0
"""The text of an answer while it is written is a beginning of its text at the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp.serving.answer_text import AnswerText


def of_bytes(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes, of which 0 has no text, as special tokens have none."""
    return bytes(token for token in tokens if token).decode(errors="replace")


def written(text: AnswerText, tokens: list[int]) -> list[str]:
    return [*(text.add(token) for token in tokens), text.finish()]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.lists(st.integers(0, 40)))
def test_pieces_make_up_the_text(text: str, places: list[int]) -> None:
    tokens = list(text.replace("\0", "").encode())
    for place in places:
        tokens.insert(min(place, len(tokens)), 0)
    pieces = written(AnswerText(of_bytes), tokens)
    assert "".join(pieces) == of_bytes(tokens)
    assert all(piece.encode().decode() == piece for piece in pieces)


@given(st.text("abé"), st.lists(st.text("abé", min_size=1), min_size=1))
def test_a_stop_text_is_never_sent(text: str, stops: list[str]) -> None:
    tokens = list(text.encode())
    answer = AnswerText(of_bytes, stops)
    sent = "".join(written(answer, tokens))
    # The first that is complete, not the first that begins: nobody knows what is to come.
    ends = [index for index in range(len(text) + 1) if any(text[:index].endswith(stop) for stop in stops)]
    expected = text if not ends else min((text[: ends[0]].removesuffix(stop) for stop in stops), key=len)
    assert (sent, answer.stopped) == (expected, bool(ends))


def test_what_may_be_a_stop_text_waits() -> None:
    answer = AnswerText(of_bytes, ["<end>"])
    assert [answer.add(token) for token in b"a<en<end>b"] == ["a", "", "", "", "<en", "", "", "", "", ""]
    assert (answer.finish(), answer.stopped, len(answer.tokens)) == ("", True, 10)


def test_half_a_character_waits_and_is_shown_at_the_end() -> None:
    answer = AnswerText(of_bytes)
    assert [answer.add(token) for token in "é".encode()] == ["", "é"]
    assert [answer.add(token) for token in "é".encode()[:1]] == [""]
    assert answer.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("length", [1, 5, 400])
def test_few_tokens_are_decoded_again(length: int) -> None:
    most = 0

    def decode(tokens: list[int]) -> str:
        nonlocal most
        most = max(most, len(tokens))
        return of_bytes(tokens)

    assert "".join(written(AnswerText(decode), [97] * length)) == "a" * length
    assert most <= 2
