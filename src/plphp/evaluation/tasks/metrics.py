# SPDX-License-Identifier: Apache-2.0
"""How an answer is scored against the accepted answers; every score is in [0, 1]."""

from __future__ import annotations

import re
import statistics
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from plphp.errors import ConfigError, did_you_mean

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation.replace("-", "").replace(".", ""), " "))
RELAXED_TOLERANCE = 0.05


@dataclass(frozen=True)
class Metric:
    """A way to score answers, and to make the score of a sample of them.

    Parameters
    ----------
    compare : callable
        Score of an answer against one accepted answer, in [0, 1].
    over_turns : callable
        Score of a sample from those of its scored turns. By default the lowest: all turns have to be right.
    verifiable : bool
        Whether an answer scores 1 if it is the accepted answer word for word, and 0 otherwise. Then one pass over the
        accepted answer can say what greedy decoding would score.
    """

    compare: Callable[[str, str], float]
    over_turns: Callable[[Sequence[float]], float] = min
    verifiable: bool = False

    def score(self, answer: str, accepted: Sequence[str]) -> float:
        """Score an answer against the accepted answer that fits it best.

        Raises
        ------
        ConfigError
            If no answer is accepted.
        """
        if not accepted:
            raise ConfigError("A sample without an accepted answer cannot be scored.")
        return max(self.compare(answer, reference) for reference in accepted)


def exact_match(answer: str, accepted: str) -> float:
    """1 if both are the same text; runs of white space count as a single space, and at the ends not at all."""
    return float(answer.split() == accepted.split())


def edit_similarity(answer: str, accepted: str) -> float:
    """1 - Levenshtein distance / length of the longer text, after white space as in `exact_match`.

    Examples
    --------
    >>> edit_similarity("kitten", "sitting")  # three edits of seven characters
    0.5714285714285714
    """
    return Levenshtein.normalized_similarity(" ".join(answer.split()), " ".join(accepted.split()))


def contains(answer: str, accepted: str) -> float:
    """1 if the accepted text stands in the answer as whole words; case, punctuation and articles do not count."""
    words, accepted_words = _words(answer), _words(accepted)
    if not accepted_words:
        return 0.0
    starts = range(len(words) - len(accepted_words) + 1)
    return float(any(words[start : start + len(accepted_words)] == accepted_words for start in starts))


def relaxed_accuracy(answer: str, accepted: str) -> float:
    """ChartQA's metric: numbers may be 5 % off, and all else has to be equal but for case and white space."""
    number, accepted_number = _number(answer), _number(accepted)
    if number is None or accepted_number is None:
        return exact_match(answer.lower(), accepted.lower())
    return float(abs(number - accepted_number) <= RELAXED_TOLERANCE * abs(accepted_number))


METRICS: dict[str, Metric] = {
    "exact_match": Metric(exact_match, verifiable=True),
    "edit_similarity": Metric(edit_similarity, over_turns=statistics.fmean),
    "contains": Metric(contains),
    "relaxed_accuracy": Metric(relaxed_accuracy),
}
"""Metrics by name, as ``plphp eval --metric`` takes them."""


def get_metric(name: str) -> Metric:
    """Look a metric up by its name.

    Raises
    ------
    ConfigError
        If no metric has this name.
    """
    if name not in METRICS:
        raise ConfigError(f"Unknown metric {name!r}.{did_you_mean(name, METRICS)}")
    return METRICS[name]


def _words(text: str) -> list[str]:
    words = _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
    return [stripped for word in words if (stripped := word.strip("."))]


def _number(text: str) -> float | None:
    """The value of a text that is a number, a percentage being a hundredth."""
    text = text.strip().rstrip(".").replace(",", "").removeprefix("$")
    scale = 0.01 if text.endswith("%") else 1.0
    try:
        return float(text.removesuffix("%")) * scale
    except ValueError:
        return None
