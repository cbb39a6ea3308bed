# SPDX-License-Identifier: Apache-2.0
"""NaN and inf in the states of one row: no kernel lets them reach another, and no request ends vLLM's worker."""

from __future__ import annotations

import pytest
import torch
from test_kernels import ALL, KEPT, SCALING, Case, attend, backend, make, window
from test_packed import entries_of
from test_vllm_reading import IMAGES, TOKENS, Paged, pruning_of, reading_of, states

from plphp.engines.vllm.step import Row, Step
from plphp.kernels import compact_kv, window_scores

BAD = 1
assert backend  # the fixture


def spoiled(case: Case, bad: float, names: tuple[str, ...]) -> Case:
    for name in names:
        getattr(case, name)[BAD] = bad
    return case


@ALL
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter's numpy
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("names", [("query",), ("keys", "tail_keys"), ("values", "tail_values")], ids=str)
@pytest.mark.parametrize("kept", KEPT)
def test_other_rows_attend_as_ever(kept: str, names: tuple[str, ...], bad: float, backend: str) -> None:
    for length in (1, 3):
        case = make(1, 3, 2, 3, length, tail=7, kept=kept, value_dim=8)
        expected = attend(case)
        found = attend(spoiled(case, bad, names))
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        if backend != "torch":  # whose fused kernel makes 0 of NaN
            assert not found[BAD].isfinite().all()


@ALL
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("names", [("query",), ("tail_keys",), ("keys",)], ids=str)
def test_other_rows_are_scored_as_ever(names: tuple[str, ...], backend: str) -> None:
    case = make(2, 3, length=3, tail=9, kept="dense")
    weight, position, valid = window(case)

    def scored() -> torch.Tensor:
        return window_scores(case.query, weight, position, case.tail_keys, valid, case.prefix, SCALING).attention

    expected = scored()
    spoiled(case, torch.nan, names)
    found = scored()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[BAD].isnan().any()


@ALL
def test_what_is_kept_of_other_rows_is_as_it_was(backend: str) -> None:
    case = spoiled(make(3, 3, seq=70), torch.nan, ("keys", "values"))
    block = compact_kv(case.keys, case.values, case.keep)
    for row in (0, 2):
        for head in range(block.kv_heads):
            keys, values = entries_of(block, row, head)
            assert keys.isfinite().all()
            assert values.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_request_is_kept_beside_one_that_is_pruned(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    pruning = pruning_of()
    readings = [reading_of(pruning) for _ in range(2)]
    step = Step(pruning, [Row(str(n), one, n * TOKENS, TOKENS, 0) for n, one in enumerate(readings)])
    layers = pruning.setup.layers
    for layer in range(layers):
        table = torch.arange(32)[None].repeat(2, 1).int()
        table[1] += 32
        step._tables[layer] = table
        query, keys, values = (torch.cat([one, one]) for one in states(TOKENS, layer))
        first, count = IMAGES[0]
        keys[TOKENS + first : TOKENS + first + count] = bad
        step.after_attention(layer, (query, keys, values), query.flatten(1), 1.0, Paged(64).write)
    assert readings[1].dropped == {}
    assert set(readings[0].dropped) == set(range(layers))
    assert all(readings[0].dropped.values())
    (told,) = [record.getMessage() for record in caplog.records]
    assert "request 1 whole: the attention of layer 0 is NaN or inf" in told
    assert "look at how the images were loaded and normalised" in told
    assert set(pruning.take_pruned()) == {"0"}
