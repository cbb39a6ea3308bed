# SPDX-License-Identifier: Apache-2.0
"""Attention over codes against naive softmax in float64 over what they stand for, query by query."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_coded import DIM, HEADS, LADDERS, ROWS, VALUE_DIM, encoded, noise
from torch import Tensor

from plphp.kernels import _decode_torch as decode_torch
from plphp.kernels import coded_attention, decode, decode_attention
from plphp.kernels.coded import ALL, CodedKV, Reading
from plphp.kernels.coded_attention import attend_codes, counting_reads
from plphp.kernels.packed import PackedKV

GROUPS, SCALING = 2, 0.3
READINGS = (Reading(), Reading(0.3), Reading(0.3, rest=False), Reading(0.01), Reading(0.999))


def entries_of(block: CodedKV, row: int, head: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """By tier, keys, values and what the index says of the keys."""
    result = []
    by_index = block.decoded(torch.float64, values=False, index=True)
    for tier, index in zip(block.decoded(torch.float64), by_index, strict=True):
        start, count = tier.index[:, row, head].tolist()
        some = slice(start, start + count)
        result.append((tier.keys[some], tier.values[some], index.keys[some]))
    return result


def naive(query: Tensor, block: CodedKV, row: int, head: int) -> tuple[Tensor, Tensor, list[int]]:
    """Of the queries [group, dim] of a KV head: outputs, log-sum-exps, and entries of each tier that are read."""
    tiers = entries_of(block, row, head)
    keys, values, index = (torch.cat(parts) for parts in zip(*tiers, strict=True))
    tier = torch.cat([torch.full((len(own),), number) for number, (own, _, _) in enumerate(tiers)])
    logits, of_index = query @ keys.T * SCALING, query @ index.T * SCALING
    reading = block.reading[block.rows[row]]
    count = len(keys) if reading.share == 1 else min(len(keys), max(1, int(reading.share * len(keys) + 0.5)))
    mass = of_index.softmax(1).mean(0)
    order = mass.argsort(descending=True, stable=True)
    if 0 < count < len(keys):  # entries whose index is the same would go by their order
        assert mass[order[count - 1]] - mass[order[count]] > 1e-12
    read, unread = order[:count], order[count:]
    logits, mean, values = logits[:, read], values.mean(0), values[read]
    if reading.rest and len(unread):
        assert block.rest_values is not None
        logits = torch.cat([logits, of_index[:, unread].logsumexp(1, keepdim=True)], 1)
        held = block.rest_values[block.rows[row] * HEADS + head].double()
        assert torch.allclose(held, mean, atol=1e-3)  # rounded to float16
        values = torch.cat([values, held[None]])
    lse = logits.logsumexp(1)
    output = (logits.softmax(1) @ values) if len(values) else values.new_zeros(len(query), VALUE_DIM)
    return output, lse, [int((tier[read] == number).sum()) for number in range(len(tiers))]


def assert_is_naive(block: CodedKV, length: int = 3) -> None:
    query = noise(block.batch, HEADS * GROUPS, length, DIM, seed=7)
    with counting_reads() as counts:
        output, lse = attend_codes(query, block, SCALING)
    direct = attend_codes(query, block, SCALING)
    assert torch.allclose(direct[0], output, atol=1e-12)
    [reads] = counts
    expected_reads = torch.zeros_like(reads)
    for row in range(block.batch):
        for head in range(HEADS):
            heads = slice(head * GROUPS, (head + 1) * GROUPS)
            for number in range(length):
                expected, of_naive, read = naive(query[row, heads, number], block, row, head)
                assert torch.allclose(output[row, heads, number], expected, atol=1e-12)
                assert torch.allclose(lse[row, heads, number], of_naive, atol=1e-12)
                expected_reads[row] += torch.tensor(read) / length
    assert torch.allclose(reads, expected_reads)


@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("names", [("c3",), ("kivi2", "r1"), ("r4", "c4", "r2")], ids=str)
def test_attention_is_naive_softmax(names: tuple[str, ...], reading: Reading) -> None:
    assert_is_naive(encoded(names, reading=reading).select([1, 2, 0, 1]))


@pytest.mark.parametrize("names", LADDERS, ids=str)
def test_all_rungs_are_read_in_full(names: tuple[str, ...]) -> None:
    assert_is_naive(encoded(names).among(1, 0))


def test_product_codes_are_an_index() -> None:
    """Of two centroids an entry; in these heads none has the same two as another."""
    assert_is_naive(encoded(("pr2", "rvq", "pq"), rows=2, reading=Reading(0.25)), length=1)


def test_rows_that_recall_beside_rows_that_do_not() -> None:
    block = encoded(("kivi4", "r3"), reading=Reading(0.3))
    assert_is_naive(replace(block, reading=(ALL, *block.reading[1:])))


def test_long_queries_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    logits_of = coded_attention._logits

    def noted(query: Tensor, *states: Tensor) -> Tensor:
        parts.append(query.shape[3])
        return logits_of(query, *states)

    monkeypatch.setattr(coded_attention, "_logits", noted)
    query = noise(ROWS, HEADS * GROUPS, 7, DIM)
    for reading in (Reading(), Reading(0.3)):
        block = encoded(("c3", "r2"), reading=reading)
        output, lse = attend_codes(query, block, SCALING)
        with monkeypatch.context() as patch:
            patch.setattr("plphp.kernels.coded_attention.MAX_LOGITS", 2 * query.shape[0] * query.shape[1] * 60)
            parts.clear()
            cut = attend_codes(query, block, SCALING)
            assert max(parts) < query.shape[2]
        assert torch.allclose(cut[0], output, atol=1e-12)
        assert torch.allclose(cut[1], lse, atol=1e-12)


@pytest.mark.parametrize("reading", [Reading(), Reading(0.3)], ids=str)
def test_parts_of_a_layer_share_one_softmax(reading: Reading) -> None:
    """Whole entries, the codes of two prompts, and a tail with a causal mask."""
    blocks = [encoded(("c3", "r2"), reading=Reading()), encoded(("r4",), reading=reading)]
    counts = ((3, 0), (1, 4), (2, 2))
    prefix = PackedKV(noise(12, DIM, seed=3), noise(12, VALUE_DIM, seed=4), counts, (0, 1, 2))
    tail = noise(ROWS, HEADS, 5, DIM, seed=5), noise(ROWS, HEADS, 5, VALUE_DIM, seed=6)
    query = noise(ROWS, HEADS * GROUPS, 2, DIM, seed=8)
    output = decode_attention(query, prefix, *tail, None, SCALING, blocks)
    for row in range(ROWS):
        for head in range(HEADS):
            start, count = prefix.index[:, row, head].tolist()
            for number in range(2):
                of_query = query[row, head * GROUPS : (head + 1) * GROUPS, number]
                seen = 5 - 1 + number
                keys = torch.cat([prefix.keys[start : start + count], tail[0][row, head, :seen]])
                values = torch.cat([prefix.values[start : start + count], tail[1][row, head, :seen]])
                logits = of_query @ keys.T * SCALING
                parts = [(logits.softmax(1) @ values, logits.logsumexp(1))]
                parts += [naive(of_query, block, row, head)[:2] for block in blocks]
                weights = torch.stack([lse for _, lse in parts], 1).softmax(1)
                expected = sum(weights[:, i, None] * own for i, (own, _) in enumerate(parts))
                actual = output[row, number, head * GROUPS : (head + 1) * GROUPS]
                assert torch.allclose(actual, expected, atol=1e-12)


def test_a_step_with_gradients_follows_a_step_in_inference_mode() -> None:
    block = encoded(("c3", "r2"), reading=Reading(0.3))
    query = noise(block.batch, HEADS * GROUPS, 1, DIM, seed=7)
    with torch.inference_mode():
        expected, _ = attend_codes(query, block, SCALING)
    query.requires_grad_()
    output, _ = attend_codes(query, block, SCALING)
    output.sum().backward()
    assert torch.equal(output.detach(), expected)
    assert query.grad is not None
    assert query.grad.any()


def test_the_mask_of_several_queries_is_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask of transformers it is a causal one, which is made in main memory."""
    masks = []

    def noting(*states: Any, want_lse: bool) -> tuple[Tensor, Tensor]:
        masks.append(states[4].device)
        return decode_torch.attend_parts(*states, want_lse=want_lse)

    monkeypatch.setattr(decode, "attend_parts", noting)
    with torch.device("meta"):
        prefix = PackedKV(torch.empty(8, DIM), torch.empty(8, VALUE_DIM), ((2, 2), (2, 2)), (0, 1))
        query, keys, values = (torch.empty(2, heads, 3, dim) for heads, dim in ((4, DIM), (2, DIM), (2, VALUE_DIM)))
    decode._with_lse(query, prefix, keys, values, None, SCALING)
    assert masks == [query.device]
