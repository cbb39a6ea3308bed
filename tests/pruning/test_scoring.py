# SPDX-License-Identifier: Apache-2.0
"""Scores of a prompt that follows another and comes in chunks."""

from __future__ import annotations

import pytest
import torch

from plphp import PLPHPConfig
from plphp.families.spans import VisionSpans
from plphp.policy.evidence import Evidence
from plphp.pruning.entries import LayerEntries
from plphp.pruning.placement import whole_or_dropped
from plphp.pruning.scoring import Attended, Scoring
from precision import assert_exact

PAST, END = 4, 11


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cuts", [[], [7], [5, 9, 10]], ids=str)
@pytest.mark.parametrize("rows", [1, 3, "text"])
def test_scores_of_a_later_prompt_are_naive_softmax_mass(rows: int | str, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 1, END, 6, generator=generator).double() for _ in range(2))
    query = torch.randn(2, 2, END, 6, generator=generator).double()
    keep = torch.rand(2, 1, PAST, generator=generator) < 0.5
    entries = LayerEntries()
    entries.append(keys[:, :, :PAST], values[:, :, :PAST])
    entries.compact(whole_or_dropped(keep))
    valid = torch.ones(2, END, dtype=torch.bool)
    valid[1, PAST : PAST + 2] = False
    segment = torch.full((2, END), -1)
    segment[:, 6:8] = 0
    spans = VisionSpans(segment, valid, PAST, ((None,), (None,)))
    scoring = Scoring.of(spans, PLPHPConfig(query_rows=rows), Evidence())  # type: ignore[arg-type]
    for begin, end in zip([PAST, *cuts], [*cuts, END], strict=True):
        entries.append(keys[:, :, begin:end], values[:, :, begin:end])
        attended = Attended(3, query[:, :, begin:end], entries, 0.7)
        scoring.gather(attended)
    scoring.score(attended)
    (scores,) = scoring.scores.values()

    wanted = [10] if rows == 1 else [8, 9, 10]
    seen_before = torch.cat([keep[:, 0], valid[:, PAST:]], dim=1)
    for row in range(2):
        for head in range(2):
            expected = torch.zeros(END, dtype=torch.float64)
            for position in wanted:
                seen = (seen_before[row] & (torch.arange(END) <= position)).nonzero()[:, 0]
                logits = keys[row, 0, seen] @ query[row, head, position] * 0.7
                expected[seen] += logits.softmax(0) / len(wanted)
            assert_exact(scores.attention[row, head], expected[PAST:])
    assert (scores.layer, scores.kv_heads) == (3, 1)
    assert torch.equal(scores.segment, segment[:, PAST:])
    assert torch.equal(scores.valid, valid[:, PAST:])
