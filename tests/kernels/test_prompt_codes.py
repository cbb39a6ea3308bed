# SPDX-License-Identifier: Apache-2.0
"""Codes of many prompts in one block against one block for each prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from test_coded import DIM, HEADS, ROWS, VALUE_DIM, encoded, noise
from torch import Tensor

from plphp.kernels.coded import CodedKV, Reading
from plphp.kernels.coded_attention import attend_codes
from plphp.kernels.decode import decode_attention
from plphp.kernels.merge import merge_states
from plphp.kernels.packed import PackedKV
from plphp.kernels.prompt_attention import attend_prompts
from plphp.kernels.prompt_codes import PromptCodes

SCALING = 0.3


def prompts() -> list[CodedKV]:
    """Several prompts of as many rows: rungs that differ, rows that hold nothing of one of them."""
    alone = encoded(("rvq", "pq"), rows=1)
    return [encoded(("c3", "r2")), encoded(("r4", "kivi2")), alone.among(1, ROWS - 2), encoded(("pr2", "r1"))]


def joined(blocks: list[CodedKV]) -> PromptCodes:
    result = PromptCodes.of(blocks[0], 0)
    for start, block in enumerate(blocks[1:], 1):
        result = result.appended(PromptCodes.of(block, start))
    return result


def assert_alike(query: Tensor, block: PromptCodes, blocks: list[CodedKV]) -> None:
    output, lse = attend_prompts(query, block, SCALING)
    expected, total = merge_states(*zip(*(attend_codes(query, own, SCALING) for own in blocks), strict=True))
    assert torch.allclose(output, expected, atol=1e-12)
    assert torch.allclose(lse, total, atol=1e-12)


@pytest.mark.parametrize("reading", [Reading(), Reading(0.4)], ids=str)
@pytest.mark.parametrize("length", [1, 3])
def test_one_call_is_as_many_merged(length: int, reading: Reading) -> None:
    blocks = [*prompts(), encoded(("c4",), reading=reading)]
    assert_alike(noise(ROWS, HEADS * 2, length, DIM), joined(blocks), blocks)


def test_rows_are_chosen_repeated_and_freed() -> None:
    blocks = prompts()
    block = joined(blocks)
    for rows in ([2, 0], [1, 1, 0, 2], [0]):
        assert_alike(noise(len(rows), HEADS * 2, 1, DIM), block.select(rows), [own.select(rows) for own in blocks])
    assert block.select([0]).nbytes < block.nbytes
    assert block.select([0, 0]).nbytes == block.select([0]).nbytes
    again = block.select([0, 0]).unshared()
    assert again.nbytes == 2 * block.select([0]).nbytes
    assert_alike(noise(2, HEADS * 2, 1, DIM), again, [own.select([0, 0]) for own in blocks])


def test_a_row_without_codes_attends_to_nothing() -> None:
    block = joined([encoded(("r4", "r2"), rows=1).among(1, 1), encoded(("r3",), rows=1).among(1, 1)])
    output, lse = attend_prompts(noise(3, HEADS * 2, 2, DIM), block, SCALING)
    assert bool((output[[0, 2]] == 0).all())
    assert bool((lse[[0, 2]] == -torch.inf).all())
    nothing = block.select([0])
    assert not any(map(any, nothing.held))
    assert nothing.nbytes < block.nbytes


def test_what_is_no_number_stays_in_its_row() -> None:
    block = joined(prompts()).select([0, 1])
    query = noise(2, HEADS * 2, 1, DIM)
    query[0] = torch.nan
    output, _ = attend_prompts(query, block, SCALING)
    assert bool(output[0].isnan().all())
    assert bool(output[1].isfinite().all())


def test_decoded_is_in_the_rows_of_the_batch() -> None:
    blocks = prompts()
    block = joined(blocks).select([1, 0])
    sums = torch.zeros(2, HEADS, dtype=torch.float64)
    for tier in block.decoded(torch.float64):
        for row in range(2):
            for head in range(HEADS):
                start, count = tier.index[:, row, head].tolist()
                sums[row, head] += tier.keys[start : start + count].sum()
    expected = torch.zeros(2, HEADS, dtype=torch.float64)
    for own in (own.select([1, 0]) for own in blocks):
        for tier in own.decoded(torch.float64):
            for row in range(2):
                for head in range(HEADS):
                    start, count = tier.index[:, row, head].tolist()
                    expected[row, head] += tier.keys[start : start + count].sum()
    assert torch.allclose(sums, expected, atol=1e-12)


def test_a_copy_shares_nothing_and_reads_alike() -> None:
    block = joined(prompts())
    copied = copy.deepcopy(block)
    query = noise(ROWS, HEADS * 2, 1, DIM)
    assert torch.equal(attend_prompts(query, copied, SCALING)[0], attend_prompts(query, block, SCALING)[0])
    own = {tier.keys.streams[0].data_ptr() for tier in block.block.tiers if tier.keys.streams[0].numel()}
    assert not own & {tier.keys.streams[0].data_ptr() for tier in copied.block.tiers}


def test_whole_entries_and_a_tail_share_the_softmax() -> None:
    blocks = prompts()
    counts = ((3, 0), (1, 4), (2, 2))
    prefix = PackedKV(noise(12, DIM, seed=3), noise(12, VALUE_DIM, seed=4), counts, (0, 1, 2))
    tail = noise(ROWS, HEADS, 5, DIM, seed=5), noise(ROWS, HEADS, 5, VALUE_DIM, seed=6)
    query = noise(ROWS, HEADS * 2, 2, DIM, seed=8)
    output = decode_attention(query, prefix, *tail, None, SCALING, [joined(blocks)])
    expected = decode_attention(query, prefix, *tail, None, SCALING, blocks)
    assert torch.allclose(output, expected, atol=1e-12)
