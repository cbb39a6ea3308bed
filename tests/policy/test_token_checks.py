# SPDX-License-Identifier: Apache-2.0
"""What choosing vision tokens refuses: each error says what was given and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from plphp.errors import ConfigError, NonFiniteAttentionError
from plphp.policy.diversity import dpp, max_min
from plphp.policy.merging import pool, visionzip
from plphp.policy.relevance import relevance
from plphp.policy.top_tokens import top, top_over_layers, top_rows

X, S = torch.ones(6, 4), torch.ones(6)
CHOICES: dict[str, Callable[[Any], Any]] = {
    "max_min": lambda keep: max_min(X, keep),
    "dpp": lambda keep: dpp(X, keep),
    "top": lambda keep: top(S, keep),
    "top_rows": lambda keep: top_rows(S, (2, 3), keep),
    "top_over_layers": lambda keep: top_over_layers(S[None], keep),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("keep", [0, -1, 7, 2.0, True, None, "3"])
def test_a_number_of_tokens_that_cannot_stay(choice: str, keep: Any) -> None:
    with pytest.raises(ConfigError, match=rf"keep must be an integer from 1 to the 6 vision tokens .*, got {keep!r}"):
        CHOICES[choice](keep)


@pytest.mark.parametrize("features", [X[0], X[None], X[:0], X[:, :0], X.long()], ids=lambda x: str(list(x.shape)))
def test_features_of_another_shape(features: torch.Tensor) -> None:
    shape = rf"{'int64' if features.dtype == torch.int64 else 'float32'} \[{', '.join(map(str, features.shape))}\]"
    for use in (
        lambda: max_min(features, 1),
        lambda: dpp(features, 1),
        lambda: dpp(features, 1, S),
        lambda: relevance(features, X),
        lambda: visionzip(features, X, S, 1, 1),
        lambda: pool(features, (2, 3), 0.5),
    ):
        with pytest.raises(ConfigError, match=rf"features must be a floating tensor \[tokens, dim\] .*, got {shape}"):
            use()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: dpp(X, 2, S[:5]), r"relevance must be a floating tensor \[6\], got float32 \[5\]"),
        (lambda: dpp(X, 2, S.int()), r"relevance must be a floating tensor \[6\], got int32 \[6\]"),
        (lambda: dpp(X, 2, S - 1.5), "relevance must be at least 0, got -0.5"),
        (lambda: relevance(X, X[:, :3]), "must have the same dimension, got 4 and 3"),
        (lambda: relevance(X, X[0]), r"text must be a floating tensor \[tokens, dim\]"),
        (lambda: top(X, 2), r"scores must be a floating tensor \[tokens\], got float32 \[6, 4\]"),
        (lambda: top(S[:0], 2), r"scores must be a floating tensor \[tokens\], got float32 \[0\]"),
        (lambda: top_over_layers(S, 2), r"scores must be \[layers, tokens\] .*, got \[6\]"),
        (lambda: top_over_layers(X[:0], 2), r"scores must be \[layers, tokens\] .*, got \[0, 4\]"),
        (lambda: top_rows(S, (2, 4), 2), r"grid must be the \(rows, columns\) of the 6 vision tokens .*, got \(2, 4\)"),
        (lambda: top_rows(S, (-2, -3), 2), r"grid .*, got \(-2, -3\)"),
        (lambda: pool(X, (6,), 0.5), r"grid .*, got \(6,\)"),  # type: ignore[arg-type]
        (lambda: pool(X, (2, 3), 0.0), "keep_share must be a number above 0 and at most 1, got 0.0"),
        (lambda: pool(X, (2, 3), float("nan")), "keep_share .*, got nan"),
        (lambda: visionzip(X, X[:5], S, 1, 1), "keys must be those of the 6 vision tokens of the image, got 5"),
        (lambda: visionzip(X, X, S[:5], 1, 1), r"scores must be a floating tensor \[6\], got float32 \[5\]"),
        (lambda: visionzip(X, X, S, 5, 2), r"dominant \+ contextual must be from 1 to the 6 .*, got 5 \+ 2"),
        (lambda: visionzip(X, X, S, 0, 0), r"dominant \+ contextual .*, got 0 \+ 0"),
        (lambda: visionzip(X, X, S, -1, 2), "dominant must be an integer of at least 0, got -1"),
    ],
)
def test_what_does_not_fit(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        use()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(number: float) -> None:
    x, s = X.clone(), S.clone()
    x[3, 2] = s[3] = number
    what = "NaN" if number != number else "inf"
    for name, use in (
        ("features", lambda: max_min(x, 2)),
        ("features", lambda: dpp(x.bfloat16(), 2)),
        ("relevance", lambda: dpp(X, 2, s)),
        ("text", lambda: relevance(X, x)),
        ("scores", lambda: top(s, 2)),
        ("scores", lambda: top_rows(s, (2, 3), 2)),
        ("scores", lambda: top_over_layers(s[None], 2)),
        ("keys", lambda: visionzip(X, x, S, 1, 1)),
        ("features", lambda: pool(x, (2, 3), 0.5)),
    ):
        with pytest.raises(NonFiniteAttentionError, match=f"{name} holds {what}"):
            use()
