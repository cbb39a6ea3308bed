# SPDX-License-Identifier: Apache-2.0
"""Scores of a prompt that follows another and comes in chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from plphp import ConfigError, PLPHPConfig, UnsupportedFeatureError
from plphp.families.spans import VisionSpans
from plphp.policy.bank import LayerBank, QueryBank
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.rotation import Rotation
from plphp.pruning.entries import LayerEntries
from plphp.pruning.packing import Packing
from plphp.pruning.placement import whole_or_dropped
from plphp.pruning.row_weights import row_weights
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


LAYER, END_B = 3, 12


def states(batch: int = 2, seq: int = END_B, q_heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = (q_heads, kv_heads, kv_heads)
    drawn = [torch.randn(batch, heads, seq, 6, generator=generator).double() for heads in shapes]
    return drawn[0], drawn[1], drawn[2]


def spans_of(valid: Tensor) -> VisionSpans:
    """Images at 4, 5 and 7, 8, behind the padding of all rows."""
    segment = torch.full(valid.shape, -1)
    segment[:, 4:6], segment[:, 7:9] = 0, 1
    return VisionSpans(segment, valid, 0, ((None, None),) * len(valid))


def scored(
    evidence: Evidence,
    spans: VisionSpans,
    tensors: tuple[Tensor, Tensor, Tensor],
    hidden: Tensor | None = None,
    **more: Any,
) -> LayerScores:
    """The scores of a prompt that is read in two chunks; in one, where tokens have left before the layer."""
    query, keys, values = tensors
    scoring = Scoring.of(spans, PLPHPConfig(), evidence, **more)
    entries = LayerEntries()
    packing = None if hidden is None else Packing.of(~hidden)
    if packing is not None:
        query, keys, values = (packing.take(part.transpose(1, 2)).transpose(1, 2) for part in tensors)
    for begin, end in ((0, 5), (5, END_B)) if packing is None else ((0, packing.packed),):
        entries.append(keys[:, :, begin:end], values[:, :, begin:end], packing)
        attended = Attended(LAYER, query[:, :, begin:end], entries, 0.7)
        scoring.gather(attended)
    scoring.score(attended)
    assert scoring._gathered == {}
    return scoring.scores[LAYER]


def mass(tensors: tuple[Tensor, Tensor, Tensor], row: int, head: int, seen: list[int], query: Tensor) -> Tensor:
    """Softmax mass of one query on every entry."""
    out = torch.zeros(END_B).double()
    out[seen] = (tensors[1][row, head // 2, seen] @ query * 0.7).softmax(0)
    return out


def by_first_row(among_rows: Tensor) -> Tensor:
    """What all query heads and rows give to each row, doubled in the first half: not symmetric in any axis."""
    heads = torch.arange(1, len(among_rows) + 1)[:, None, None]
    return (among_rows * heads).sum((0, 1)) * torch.arange(1, among_rows.shape[-1] + 1)


@pytest.mark.usefixtures("float64")
def test_query_rows_are_weighed_prompt_by_prompt() -> None:
    """Rows of a batch have different query rows: each is asked as if it were alone, with what its rows see."""
    valid = torch.ones(2, END_B, dtype=torch.bool)
    valid[1, :3] = False
    spans, tensors = spans_of(valid), states()
    spans.segment[1, 4:9] = torch.tensor([-1, -1, -1, 0, 0])  # the second row asks from behind its only image
    scores = scored(Evidence(rows="text_after_first", weigh_rows=by_first_row), spans, tensors)
    assert scores.weighted_attention is not None
    plain = scored(Evidence(rows="text_after_first"), spans, tensors)
    assert_exact(scores.attention, plain.attention)
    assert plain.weighted_attention is None
    for row, rows in enumerate([[6, 9, 10, 11], [9, 10, 11]]):
        masses = torch.stack(
            [
                torch.stack(
                    [
                        mass(tensors, row, head, [s for s in range(q + 1) if valid[row, s]], tensors[0][row, head, q])
                        for q in rows
                    ]
                )
                for head in range(4)
            ]
        )
        weights = by_first_row(masses[:, :, rows])
        expected = (masses * (weights / weights.sum())[None, :, None]).sum(1)
        assert_exact(scores.weighted_attention[row], expected)


@pytest.mark.parametrize(
    "wrong", [lambda mass: mass.sum((0, 1)) - 9, lambda mass: mass.sum(0), lambda mass: mass.sum((0, 1)) / 0]
)
def test_weights_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="weigh_rows has to give each of the 3 query rows a finite weight"):
        row_weights(wrong, torch.ones(1, 2, 3, 3), torch.ones(1, 3) / 3)


def test_rows_of_no_weight_count_alike() -> None:
    weight = torch.tensor([[0.5, 0.5, 0.0]])
    assert torch.equal(row_weights(lambda mass: mass.sum((0, 1)) * 0, torch.ones(1, 2, 3, 3), weight), weight)


@pytest.mark.usefixtures("float64")
def test_a_bank_and_the_own_rows_ask_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own rows see the prompt up to themselves, the queries of the bank all of it; every query counts as much."""
    still = Rotation(torch.zeros(1).double())
    sample = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1)).double()
    bank = QueryBank({LAYER: LayerBank(sample, still)}, torch.arange(5), {"decoder_layers": 4})
    monkeypatch.setattr("plphp.pruning.scoring.bank_at", lambda name: bank)
    valid = torch.ones(2, END_B, dtype=torch.bool)
    valid[1, :3] = False
    tensors = states()
    asked = Evidence(rows=2, bank="a bank", peak=True)
    scores = scored(replace(asked, beside_rows=True), spans_of(valid), tensors)
    assert scores.peak is not None
    for row in range(2):
        every = [position for position in range(END_B) if valid[row, position]]
        for head in range(4):
            rows = [
                mass(tensors, row, head, [s for s in every if s <= q], tensors[0][row, head, q])
                for q in (END_B - 2, END_B - 1)
            ]
            rows += [mass(tensors, row, head, every, query) for query in sample[head]]
            assert_exact(scores.attention[row, head], torch.stack(rows).mean(0))
            assert_exact(scores.peak[row, head], torch.stack(rows).amax(0))
    assert (scored(asked, spans_of(valid), tensors).attention - scores.attention).abs().max() > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["rows", "prompt"])
def test_states_are_those_of_the_layer(kind: Any) -> None:
    valid = torch.ones(2, END_B, dtype=torch.bool)
    valid[1, :3] = False
    rotation = Rotation(torch.ones(2).double())
    evidence = Evidence(rows=2, states=kind, rotation=True)
    tensors = states()
    found = scored(evidence, spans_of(valid), tensors, rotations=lambda: {LAYER: rotation}).need_states()
    first = END_B - 2 if kind == "rows" else 0
    assert torch.equal(found.keys, tensors[1])
    assert torch.equal(found.values, tensors[2])
    assert found.keys.data_ptr() == found.tail()[0].data_ptr()  # a view
    assert torch.equal(found.queries, tensors[0][:, :, first:])
    assert torch.equal(found.asking, valid[:, first:])
    assert found.index.tolist() == list(range(first, END_B))
    assert found.position[1].tolist() == [max(-1, number - 3) for number in range(first, END_B)]
    assert found.end.tolist() == [[END_B], [END_B - 3]]
    assert (found.scaling, found.need_rotation()) == (0.7, rotation)
    found.let_go()
    with pytest.raises(ConfigError, match="let go"):
        found.queries  # noqa: B018


def test_tokens_that_have_left_before_a_layer_do_not_ask() -> None:
    valid = torch.ones(1, END_B, dtype=torch.bool)
    hidden = torch.zeros_like(valid)
    hidden[0, [4, 8]] = True
    scores = scored(Evidence(states="prompt"), spans_of(valid), states(1), hidden)
    there = (~hidden)[0].nonzero()[:, 0]
    states_ = scores.need_states()
    assert states_.asking.tolist() == [[True] * len(there)]
    assert states_.keys.shape[2] == len(there)
    assert torch.equal(states_.position, there[None])
    assert torch.equal(scores.segment, spans_of(valid).segment[:, there])
    assert torch.equal(scores.need("token_number"), there[None])  # they are counted where they stood


def test_positions_under_m_rope_are_those_of_text_outside_of_the_images() -> None:
    valid = torch.ones(2, END_B, dtype=torch.bool)
    valid[1, :3] = False
    delta = torch.tensor([[-2], [-1]])
    evidence = Evidence(states="prompt")
    found = scored(evidence, spans_of(valid), states(), rope_delta=delta).need_states()
    assert found.position.tolist() == [
        [0, 1, 2, 3, -1, -1, -1, -1, -1, 7, 8, 9],
        [-1, -1, -1, 0, -1, -1, -1, -1, -1, 5, 6, 7],
    ]
    assert found.end.tolist() == [[10], [8]]
    later = replace(spans_of(valid), start=2)
    found = scored(evidence, later, states(), rope_delta=delta).need_states()
    assert found.index.tolist() == list(range(2, END_B))
    assert found.position[0].tolist() == [-1] * 7 + [7, 8, 9]


def test_rows_that_are_not_finite_are_found_and_blanked_in_the_states() -> None:
    valid = torch.ones(3, END_B, dtype=torch.bool)
    valid[1, :3] = False
    tensors = states(batch=3)
    tensors[2][1, 0, 1] = torch.nan  # a value of padding
    tensors[2][2, 1, 6] = torch.inf  # one that no score reads
    evidence = Evidence(states="prompt")
    scores = scored(evidence, spans_of(valid), tensors)
    assert scores.finite().tolist() == [True, True, False]
    blanked = scores.blanked([2])
    assert blanked.finite().all()
    states_ = blanked.need_states()
    for read in (states_.keys, states_.values, states_.queries):
        assert not read[2].any()
    assert torch.equal(states_.keys[:2], tensors[1][:2])
    assert torch.isinf(tensors[2][2, 1, 6]).all()
    cut = scores.first(5)
    assert cut.need_states().keys.shape[2] == cut.attention.shape[2] == 5


def test_evidence_that_contradicts_itself_is_refused() -> None:
    for wrong, words in (
        ({"beside_rows": True}, "names no bank"),
        ({"bank": "bundled", "weigh_rows": by_first_row}, "weighs the rows of a prompt"),
        ({"rotation": True}, "set Evidence.states"),
    ):
        with pytest.raises(ConfigError, match=words):
            Evidence(**wrong)  # type: ignore[arg-type]
    scores = scored(Evidence(), spans_of(torch.ones(1, END_B, dtype=torch.bool)), states(1))
    for need in (scores.need_states, lambda: scores.need("weighted_attention")):
        with pytest.raises(ConfigError, match="Evidence"):
            need()


def test_an_engine_that_knows_no_rotation_refuses_the_method() -> None:
    evidence = Evidence(states="prompt", rotation=True)
    with pytest.raises(UnsupportedFeatureError, match="'expected_attention' turns queries"):
        Scoring.of(spans_of(torch.ones(1, END_B, dtype=torch.bool)), PLPHPConfig(method="expected_attention"), evidence)


def test_a_score_of_another_shape_is_refused_with_the_method() -> None:
    from plphp.policy.allocation import uniform
    from plphp.policy.stages import KVStage

    scores = LayerScores(torch.rand(2, 4, 5), torch.zeros(2, 5).long(), torch.ones(2, 5).bool(), 0, 2)
    stage = KVStage(allocate=uniform, score=lambda scores, config: scores.attention)
    with pytest.raises(ConfigError, match=r"'mine' has to give .* here \[2, 2, 5\], got \[2, 4, 5\]"):
        stage.scored(scores, PLPHPConfig(method="mine"))


@pytest.mark.parametrize("wrong", [{"candidates": "all"}, {"states": "layers"}], ids=str)
def test_evidence_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(ConfigError, match=rf"Evidence\.{name} must be one of .*{value!r}"):
        Evidence(**wrong)
