# SPDX-License-Identifier: Apache-2.0
"""The budget and the choice of ZipVL, on attention made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plphp import PLPHPConfig
from plphp.extend import LayerScores, ScoredLayer
from plphp.families.spans import VisionSpans
from plphp.methods import zipvl
from plphp.pruning.probe_rows import with_random_rows

IMAGE = slice(1, 5)
"""Of 6 tokens: text, 4 of an image, text."""


def scores_of(rows: dict[int, list[float]], padding: int = 0, heads: int = 2) -> LayerScores:
    """Scores of a prompt of 6 tokens by the attention of some probe rows, alike in all heads."""
    queries = torch.zeros(1, padding + 6, dtype=torch.bool)
    attention = torch.zeros(padding + 6)
    for row, values in rows.items():
        queries[0, padding + row] = True
        attention[padding:] += torch.tensor(values + [0.0] * (6 - len(values))) / len(rows)
    segment = torch.full((1, padding + 6), -1)
    segment[0, padding:][IMAGE] = 0
    valid = (torch.arange(padding + 6) >= padding)[None]
    return LayerScores(attention.expand(1, heads, -1), segment, valid, 0, 1, queries=queries)


LAST = {5: [0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0]}
"""One probe row: half of its attention on the first text token, then falling over the image. No sum is rounded."""
BUDGETS = ((0.1, []), (0.5, []), (0.51, [1]), (0.75, [1]), (0.76, [1, 2]), (0.93, [1, 2, 3]), (1.0, [1, 2, 3, 4]))
"""By tau, the vision tokens that are important."""


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("tau", "vision"), BUDGETS)
def test_the_budget_is_the_least_number_that_carries_tau(tau: float, vision: list[int], padding: int) -> None:
    config = PLPHPConfig(method="zipvl", options={"tau": tau}, min_kept=0)
    scores = scores_of(LAST, padding)
    assert zipvl.rates(scores, config) == [len(vision) / 4]
    assert (zipvl.important(scores, config)[0].nonzero()[:, 0] - padding).tolist() == vision


def test_a_layer_has_its_least_kept_token() -> None:
    config = PLPHPConfig(method="zipvl", options={"tau": 0.1})
    assert zipvl.important(scores_of(LAST), config)[0].nonzero()[:, 0].tolist() == [1]


def test_the_number_goes_by_accumulated_and_the_choice_by_normalised_attention() -> None:
    # Accumulated: 0.9, 0.8, 0.3, 0.5, 0.5. Seen by 3, 3, 3, 2 and 1 rows: 0.3, 0.27, 0.1, 0.25, 0.5.
    rows = {
        2: [0.4, 0.4, 0.2],
        3: [0.3, 0.3, 0.1, 0.3],
        5: [0.2, 0.1, 0.0, 0.2, 0.5],
    }
    scores = scores_of(rows)
    assert zipvl.received(scores)[0].tolist() == pytest.approx([0.9, 0.8, 0.3, 0.5, 0.5, 0.0])
    assert zipvl.normalised(scores)[0].tolist() == pytest.approx([0.3, 0.8 / 3, 0.1, 0.25, 0.5, 0.0])
    # 0.9 + 0.8 are 57 % of 3: two tokens, of which the scores name 4 and 0.
    config = PLPHPConfig(method="zipvl", options={"tau": 0.56}, min_kept=0)
    assert zipvl.important(scores, config)[0].nonzero()[:, 0].tolist() == [4]


def test_a_rate_is_the_share_of_every_layer() -> None:
    scores = scores_of(LAST)
    for setting in ("retention_rate", "target_retention"):
        given: dict[str, Any] = {setting: 0.5}
        config = PLPHPConfig(method="zipvl", **given)
        [[row]] = zipvl.allocate([ScoredLayer(0, 1, [0.6], scores)], config)
        assert (row.rate, row.shares) == (0.5, None)
        assert zipvl.important(scores, config)[0].nonzero()[:, 0].tolist() == [1, 2]


def test_what_is_not_important_may_be_held_in_few_bits() -> None:
    config = PLPHPConfig(method="zipvl", options={"tau": 0.76, "unimportant": "kivi2"})
    [[row]] = zipvl.allocate([ScoredLayer(0, 1, [0.6], scores_of(LAST))], config)
    assert (row.rate, row.shares) == (1.0, (0.5, 1.0))
    assert zipvl.rungs(config) == ("whole", "kivi2")


def spans(padding: int, start: int = 0, tokens: int = 20) -> VisionSpans:
    segment = torch.full((1, padding + tokens), -1)
    valid = (torch.arange(padding + tokens) >= padding)[None]
    return VisionSpans(segment, valid, start, ((),))


def drawn(padding: int, number: int, seed: int, start: int = 0) -> list[int]:
    recent = torch.zeros(1, padding + 20, dtype=torch.bool)
    recent[:, -4:] = True
    rows = with_random_rows(recent, spans(padding, start), number, seed)
    assert rows[:, -4:].all()
    return (rows[0, :-4].nonzero()[:, 0] - padding).tolist()


def test_rows_are_drawn_by_the_seed_and_the_tokens_of_the_prompt() -> None:
    assert len(drawn(0, 6, 1)) == 6
    assert drawn(0, 6, 1) == drawn(5, 6, 1) != drawn(0, 6, 2)
    assert drawn(0, 100, 1) == list(range(16))
    assert drawn(0, 0, 1) == []
    assert min(drawn(0, 100, 1, start=7)) == 7
    assert drawn(0, 6, 2**70) == drawn(0, 6, 0)  # a seed is any integer from 0 on, and torch takes 64 bits
