# SPDX-License-Identifier: Apache-2.0
"""Scores of answers against values by hand."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp.errors import ConfigError
from plphp.evaluation.tasks.metrics import METRICS, get_metric


@pytest.mark.parametrize(
    ("metric", "answer", "accepted", "score"),
    [
        ("exact_match", " The  digit\nis 7. ", "The digit is 7.", 1),
        ("exact_match", "The digit is 7", "The digit is 7.", 0),
        ("exact_match", "the digit is 7.", "The digit is 7.", 0),
        ("edit_similarity", "kitten", "sitting", 1 - 3 / 7),
        ("edit_similarity", "", "abcd", 0),
        ("edit_similarity", "", "", 1),
        ("edit_similarity", "a  b", "a b", 1),
        ("edit_similarity", "abcd", "bcda", 0.5),
        ("contains", "It is the Red Star, I think.", "red star", 1),
        ("contains", "It is restart.", "star", 0),
        ("contains", "red", "red star", 0),
        ("contains", "It costs 3.5.", "3.5", 1),
        ("relaxed_accuracy", "104.9", "100", 1),
        ("relaxed_accuracy", "105.1", "100", 0),
        ("relaxed_accuracy", "1,050", "1000", 1),
        ("relaxed_accuracy", "51%", "0.5", 1),
        ("relaxed_accuracy", "Yes", "yes", 1),
        ("relaxed_accuracy", "Yes", "no", 0),
    ],
)
def test_by_hand(metric: str, answer: str, accepted: str, score: float) -> None:
    assert METRICS[metric].compare(answer, accepted) == pytest.approx(score)


def levenshtein(first: str, second: str) -> int:
    """By the definition: the least number of characters to insert, remove or replace."""
    row = list(range(len(second) + 1))
    for number, left in enumerate(first, 1):
        before, row = row, [number]
        for column, right in enumerate(second, 1):
            row.append(min(before[column] + 1, row[-1] + 1, before[column - 1] + (left != right)))
    return row[-1]


@given(st.text("ab c", max_size=9), st.text("ab c", max_size=9))
def test_edit_similarity_is_that_of_the_definition(first: str, second: str) -> None:
    texts = [" ".join(text.split()) for text in (first, second)]
    longest = max(map(len, texts))
    expected = 1 - levenshtein(*texts) / longest if longest else 1
    assert METRICS["edit_similarity"].compare(first, second) == pytest.approx(expected)


def test_long_answers_are_scored_in_no_time() -> None:
    """A page of 20,000 characters takes minutes cell by cell."""
    page = "abcdefghi " * 2_000
    started = time.perf_counter()
    assert METRICS["edit_similarity"].compare(page, page[::-1]) < 1
    assert time.perf_counter() - started < 10


def test_the_best_of_several_answers_counts() -> None:
    assert get_metric("exact_match").score("seven", ["7", "seven"]) == 1
    assert get_metric("exact_match").score("eight", ["7", "seven"]) == 0
    with pytest.raises(ConfigError, match="accepted answer"):
        get_metric("exact_match").score("seven", [])


@pytest.mark.parametrize(("name", "score"), [("exact_match", 0.0), ("edit_similarity", 0.75), ("contains", 0.0)])
def test_the_turns_of_a_dialogue(name: str, score: float) -> None:
    """All have to be right where an answer is right or wrong; partial scores are averaged."""
    metric = get_metric(name)
    turns = [metric.score(answer, ["abcd"]) for answer in ("abcd", "ab")]
    assert metric.over_turns(turns) == score


def test_only_exact_answers_can_be_verified() -> None:
    assert [name for name, metric in METRICS.items() if metric.verifiable] == ["exact_match"]


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'exact'.*exact_match"):
        get_metric("exact")
