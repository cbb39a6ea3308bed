# SPDX-License-Identifier: Apache-2.0
"""How an answer is scored against one or several accepted ones; every score is in [0, 1]."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from plphp.errors import ConfigError, did_you_mean

Metric = Callable[[str, str], float]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation.replace("-", "").replace(".", ""), " "))
RELAXED_TOLERANCE = 0.05


def exact_match(given: str, accepted: str) -> float:
    """1 if both are the same text; runs of white space count as one space, those at the ends do not count."""
    return float(given.split() == accepted.split())


def edit_similarity(given: str, accepted: str) -> float:
    """1 - Levenshtein distance / length of the longer text, after white space as in `exact_match`.

    Examples
    --------
    >>> edit_similarity("kitten", "sitting")  # three edits of seven characters
    0.5714285714285714
    """
    first, second = " ".join(given.split()), " ".join(accepted.split())
    return Levenshtein.normalized_similarity(first, second)


def contains(given: str, accepted: str) -> float:
    """1 if the accepted answer stands in the given one as whole words; case, punctuation and articles do not count."""
    words, wanted = _words(given), _words(accepted)
    places = range(len(words) - len(wanted) + 1)
    return float(bool(wanted) and any(words[at : at + len(wanted)] == wanted for at in places))


def relaxed_accuracy(given: str, accepted: str) -> float:
    """ChartQA's: numbers may be 5 % off, other answers have to be equal but for case and white space."""
    number, wanted = _number(given), _number(accepted)
    if number is None or wanted is None:
        return exact_match(given.lower(), accepted.lower())
    return float(abs(number - wanted) <= RELAXED_TOLERANCE * abs(wanted))


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "edit_similarity": edit_similarity,
    "contains": contains,
    "relaxed_accuracy": relaxed_accuracy,
}


def get_metric(name: str) -> Metric:
    """The metric of a name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name not in METRICS:
        raise ConfigError(f"Unknown metric {name!r}.{did_you_mean(name, METRICS)}")
    return METRICS[name]


def best_score(metric: Metric, given: str, accepted: Sequence[str]) -> float:
    """Score of an answer against the accepted one that fits it best.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if not accepted:
        raise ConfigError("A sample without an accepted answer cannot be scored.")
    return max(metric(given, one) for one in accepted)


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
