# SPDX-License-Identifier: Apache-2.0
"""Which of a prompt's queries ask from behind it, and what they look at there."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from torch import Tensor

from plphp import ConfigError, PLPHPConfig, UnsupportedFeatureError
from plphp.families.spans import VisionSpans
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.rotation import Rotation
from plphp.pruning.entries import LayerEntries
from plphp.pruning.packing import Packing
from plphp.pruning.placement import whole_or_dropped
from plphp.pruning.scoring import Attended, Scoring
from plphp.pruning.tail_tokens import TailTokens
from plphp.pruning.turned_rows import TurnedRows
from precision import assert_exact

PAST, END, LAYER = 6, 19, 3
FREQUENCIES = (1.0, 0.3, 0.01)
AHEAD = 2


def spans_of(padding: tuple[int, ...], images: tuple[tuple[int, int], ...], start: int = 0) -> VisionSpans:
    """Rows of END tokens, the first of this turn padding, with an image from a token to another in each."""
    valid = torch.ones(len(padding), END, dtype=torch.bool)
    segment = torch.full((len(padding), END), -1)
    for row, (number, (begin, end)) in enumerate(zip(padding, images, strict=True)):
        valid[row, start : start + number] = False
        segment[row, begin:end] = 0
    return VisionSpans(segment, valid, start, ((None,),) * len(padding))


def chosen(rows: TurnedRows) -> list[list[int]]:
    return [index[counts].tolist() for index, counts in zip(rows.index, rows.counts, strict=True)]


def turns(rows: TurnedRows) -> list[list[int]]:
    return [turn[counts].tolist() for turn, counts in zip(rows.turn, rows.counts, strict=True)]


def test_rows_are_spread_over_the_tokens_of_each_prompt() -> None:
    spans = spans_of((0, 9, 14), ((5, 9), (14, 16), (15, 17)))
    rows = TurnedRows.of(spans, None, rows=5, ahead=AHEAD)
    # The first 4 tokens are left out: 15, 6 and 1 tokens are left.
    assert chosen(rows) == [[6, 9, 12, 15, 18], [13, 14, 15, 16, 18], [18]]
    # Behind prompts of 19, 10 and 5 tokens, whatever stands before them.
    assert turns(rows) == [[15, 12, 9, 6, 3], [8, 7, 6, 5, 3], [3]]
    assert chosen(TurnedRows.of(spans, None, rows=1, ahead=0)) == [[18], [18], [18]]
    assert [len(row) for row in chosen(TurnedRows.of(spans, None, rows=99, ahead=0))] == [15, 6, 1]


def test_with_m_rope_text_of_known_positions_asks() -> None:
    spans = spans_of((0, 3, 0), ((6, 10), (10, 17), (3, 19)))
    rows = TurnedRows.of(spans, torch.tensor([[-2], [-5], [-9]]), rows=99, ahead=0)
    # Behind an image positions fall behind the number of the token by the delta, as the end of the prompt does: 17, 11.
    assert chosen(rows) == [[4, 5, *range(10, 19)], [7, 8, 9, 17, 18], [18]]
    assert turns(rows) == [[13, 12, *range(9, 0, -1)], [7, 6, 5, 2, 1], [0]]


def test_a_later_turn_asks_with_its_own_tokens() -> None:
    spans = spans_of((0, 2), ((8, 11), (9, 12)), start=PAST)
    assert chosen(TurnedRows.of(spans, None, rows=99, ahead=0)) == [list(range(6, 19)), list(range(8, 19))]
    delta = torch.tensor([[-2], [-1]])  # text before the image of a later turn has no known position
    assert chosen(TurnedRows.of(spans, delta, rows=99, ahead=0)) == [list(range(11, 19)), list(range(12, 19))]


def test_a_short_prompt_asks_with_its_last_token() -> None:
    rows = TurnedRows.of(spans_of((16,), ((16, 17),)), None, rows=9, ahead=4)
    assert (chosen(rows), turns(rows)) == ([[18]], [[5]])


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [batch, 4, END, 6], keys and values [batch, 2, END, 6]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, END, 6, generator=generator).double() for heads in (4, 2, 2))  # type: ignore[return-value]


def evidence(rows: int = 5, **fields: Any) -> Evidence:
    return Evidence(turned_rows=rows, turned_ahead=AHEAD, **fields)


def scored(
    spans: VisionSpans,
    asked: Evidence,
    cuts: list[int] | None = None,
    keep: Tensor | None = None,
    delta: Tensor | None = None,
    hidden: Tensor | None = None,
) -> LayerScores:
    """The scores of a layer that has read a prompt in chunks, behind what ``keep`` leaves of an earlier turn."""
    query, keys, values = states()
    entries = LayerEntries()
    if spans.start:
        entries.append(keys[:, :, : spans.start], values[:, :, : spans.start])
        entries.compact(whole_or_dropped(keep))
    rotations = {LAYER: Rotation(torch.tensor(FREQUENCIES, dtype=torch.float64))}
    scoring = Scoring.of(spans, PLPHPConfig(), asked, delta, lambda: rotations)
    packing = None if hidden is None else Packing.of(~hidden)
    if packing is not None:
        query, keys, values = (packing.take(part.transpose(1, 2)).transpose(1, 2) for part in (query, keys, values))
    for begin, end in zip([spans.start, *(cuts or [])], [*(cuts or []), END], strict=True):
        entries.append(keys[:, :, begin:end], values[:, :, begin:end], packing)
        attended = Attended(LAYER, query[:, :, begin:end], entries, 0.7)
        scoring.gather(attended)
    scoring.score(attended)
    assert scoring.turned is not None
    assert (scoring._gathered, scoring.turned._held) == ({}, {})
    return scoring.scores[LAYER]


def by_hand(query: Tensor, turn: int) -> Tensor:
    """A query [6] turned on, pair by pair, as complex numbers."""
    pairs = [complex(query[i], query[i + 3]) * cmath.exp(1j * turn * f) for i, f in enumerate(FREQUENCIES)]
    return torch.tensor([pair.real for pair in pairs] + [pair.imag for pair in pairs], dtype=torch.float64)


def naive(seen: Tensor, asking: list[list[tuple[int, int]]]) -> Tensor:
    """Softmax mass [batch, q_heads, rows of the first, seq] of queries by token and turn."""
    query, keys, _ = states()
    mass = torch.zeros(2, 4, max(map(len, asking)), END).double()
    for row, tokens in enumerate(asking):
        for head in range(4):
            visible = seen[row, head // 2].nonzero()[:, 0]
            for slot, (token, turn) in enumerate(tokens):
                logits = keys[row, head // 2, visible] @ by_hand(query[row, head, token], turn) * 0.7
                mass[row, head, slot, visible] = logits.softmax(0)
    return mass


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("m_rope", [False, True])
@pytest.mark.parametrize("cuts", [[], [9], [7, 12, 18]], ids=str)
@pytest.mark.parametrize("later", [False, True])
def test_turned_queries_see_all_of_the_prompt(later: bool, cuts: list[int], m_rope: bool) -> None:
    start = PAST if later else 0
    spans = spans_of((0, 3), ((9, 12), (10, 13)), start)
    keep = torch.rand(2, 2, PAST, generator=torch.Generator().manual_seed(1)) < 0.5 if later else None
    delta = torch.tensor([[-1], [-2]]) if m_rope else None
    scores = scored(spans, evidence(4, peak=True, best_position=True), cuts, keep, delta)
    asking = {  # the token and its turn: END, less the padding and the delta, + AHEAD - its own position
        (False, False): [[(6, 15), (10, 11), (14, 7), (18, 3)], [(9, 12), (12, 9), (15, 6), (18, 3)]],
        # Text before the image counts without delta, and so does not end up as far behind.
        (False, True): [[(6, 14), (12, 9), (15, 6), (18, 3)], [(8, 11), (13, 8), (15, 6), (18, 3)]],
        (True, False): [[(8, 13), (11, 10), (14, 7), (18, 3)], [(10, 11), (13, 8), (15, 6), (18, 3)]],
        (True, True): [[(12, 9), (14, 7), (16, 5), (18, 3)], [(13, 8), (15, 6), (16, 5), (18, 3)]],
    }[later, m_rope]
    seen = spans.valid[:, None].expand(-1, 2, -1).clone()
    if keep is not None:
        seen[:, :, :PAST] &= keep
    mass = naive(seen, asking)[..., start:]
    assert_exact(scores.attention, mass.mean(2))
    assert_exact(scores.need("peak"), mass.amax(2))
    of_heads = mass.unflatten(1, (2, 2)).mean(2)
    for row in range(2):
        vision = spans.vision[row, start:].nonzero()[:, 0]
        best = of_heads[row][..., vision].argsort(dim=-1, descending=True).argsort(dim=-1).amin(1)
        assert torch.equal(scores.need("best_position")[row][:, vision], best)


@pytest.mark.usefixtures("float64")
def test_surplus_rows_count_for_nothing() -> None:
    """A prompt of 6 tokens has 2 that ask, beside one that has 9."""
    spans = spans_of((0, 13), ((9, 12), (14, 16)))
    scores = scored(spans, evidence(9))
    seen = spans.valid[:, None].expand(-1, 2, -1)
    tokens = [[4, 6, 8, 9, 11, 13, 14, 16, 18], [17, 18]]
    asking = [[(token, END + AHEAD - token) for token in row] for row in tokens]
    mass = naive(seen, asking)
    assert_exact(scores.attention[0], mass[0].mean(1))
    assert_exact(scores.attention[1], mass[1, :, :2].mean(1))


@pytest.mark.usefixtures("float64")
def test_tokens_that_have_left_do_not_ask() -> None:
    spans = spans_of((0, 0), ((5, 9), (5, 9)))
    hidden = torch.zeros(2, END, dtype=torch.bool)
    hidden[1, 6:8] = True
    scores = scored(spans, evidence(5), hidden=hidden)
    seen = (spans.valid & ~hidden)[:, None].expand(-1, 2, -1)
    asking = [[(token, END + AHEAD - token) for token in row] for row in ([6, 9, 12, 15, 18], [9, 12, 15, 18])]
    mass = naive(seen, asking)
    attention = TailTokens(0, 0, Packing.of(~hidden)).spread(scores.attention, 0)
    assert_exact(attention[0], mass[0].mean(1))
    assert_exact(attention[1], mass[1, :, :4].mean(1))


@pytest.mark.usefixtures("float64")
def test_rows_are_repeated_with_their_prompt() -> None:
    spans = spans_of((0, 5), ((9, 12), (14, 16)))
    delta = torch.tensor([[-1], [-2]])
    rows = TurnedRows.of(spans, delta, 5, AHEAD)
    rows.repeat(2)
    assert chosen(rows) == chosen(TurnedRows.of(spans.repeated(2), delta.repeat_interleave(2, dim=0), 5, AHEAD))
    assert turns(rows) == turns(TurnedRows.of(spans.repeated(2), delta.repeat_interleave(2, dim=0), 5, AHEAD))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"turned_rows": 0}, "turned_rows must be an integer of at least 1, got 0"),
        ({"turned_rows": 2.5}, "turned_rows must be an integer of at least 1, got 2.5"),
        ({"turned_rows": True}, "turned_rows must be an integer"),
        ({"turned_rows": 4, "turned_ahead": -1}, "turned_ahead must be an integer of at least 0, got -1"),
        ({"turned_ahead": 3}, "set Evidence.turned_rows"),
        ({"turned_rows": 4, "bank": "bundled"}, "together with Evidence.bank"),
        ({"turned_rows": 4, "bank": "bundled", "beside_rows": True}, "together with Evidence.bank"),
        ({"turned_rows": 4, "weigh_rows": lambda mass: mass[0, 0]}, "together with Evidence.weigh_rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),  # no address of a function
)
def test_evidence_that_contradicts_itself_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Evidence(**wrong)


def test_an_engine_that_knows_no_rotation_refuses_the_method() -> None:
    spans = spans_of((0,), ((9, 12),))
    with pytest.raises(UnsupportedFeatureError, match="'prompt_queries' turns queries"):
        Scoring.of(spans, PLPHPConfig(method="prompt_queries"), evidence())
