# SPDX-License-Identifier: Apache-2.0
"""Long queries on a CPU attend to decoded codes beside whole entries, as the reference attends to the codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plphp.kernels import decode_attention
from plphp.kernels.coded import CodedKV, Reading
from plphp.kernels.coded_attention import counting_reads
from plphp.kernels.coder import Coder
from plphp.kernels.decoded_prefix import with_decoded
from plphp.kernels.packed import PackedKV
from plphp.kernels.prompt_codes import PromptCodes
from plphp.kernels.rungs import RUNGS

HEADS, DIM = 2, 32


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def block(seed: int, reading: Reading | None = None, dtype: torch.dtype = torch.float64) -> CodedKV:
    """Codes of 20 entries of two rows, some of them dropped, in two rungs of which one has groups."""
    keys, values = (
        drawn(2, HEADS, 20, DIM, seed=seed, dtype=dtype),
        drawn(2, HEADS, 20, DIM, seed=seed + 1, dtype=dtype),
    )
    placement = torch.randint(0, 3, (2, HEADS, 20), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    coder = Coder((RUNGS["r3"], RUNGS["c3"]), reading=reading or Reading())
    coded = coder.encode(keys, values, torch.ones(2, 20, dtype=torch.bool), placement)
    assert coded is not None
    return coded


def prefix(dtype: torch.dtype = torch.float64) -> PackedKV:
    """Whole entries of two rows that are read in the other order; a head has none."""
    return PackedKV(drawn(12, DIM, seed=8, dtype=dtype), drawn(12, DIM, seed=9, dtype=dtype), ((5, 0), (3, 4)), (1, 0))


def states(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values of the tail that they stand in."""
    return (
        drawn(2, 2 * HEADS, length, DIM, seed=4, dtype=dtype),
        drawn(2, HEADS, length, DIM, seed=5, dtype=dtype),
        drawn(2, HEADS, length, DIM, seed=6, dtype=dtype),
    )


def by_hand(query: Tensor, whole: PackedKV, keys: Tensor, values: Tensor, coded: list[CodedKV | PromptCodes]) -> Tensor:
    """Softmax over everything, head by head."""
    parts = [whole, *(tier for own in coded for tier in own.decoded(torch.float64))]
    output, length = torch.empty_like(query), query.shape[2]
    for row in range(2):
        for head in range(2 * HEADS):
            own = head // 2
            split = [part._split() for part in parts]
            held = [torch.cat([side[i][row * HEADS + own].double() for side in split]) for i in (0, 1)]
            of_keys, of_values = (torch.cat([a, b[row, own]]) for a, b in zip(held, (keys, values), strict=True))
            logits = query[row, head] @ of_keys.T * 0.3
            tail = torch.ones(length, length, dtype=torch.bool).tril()
            shown = torch.cat([torch.ones(length, len(held[0]), dtype=torch.bool), tail], 1)
            output[row, head] = logits.masked_fill(~shown, -torch.inf).softmax(-1) @ of_values
    return output.transpose(1, 2)


def many() -> PromptCodes:
    """Three prompts, of which the rows hold different numbers of entries."""
    codes = [PromptCodes.of(block(seed), prompt) for prompt, seed in enumerate((1, 11, 21))]
    return codes[0].appended(codes[1]).appended(codes[2])


@pytest.mark.parametrize("length", [1, 7, 50])
def test_codes_of_one_prompt_and_of_many_beside_whole_entries(length: int) -> None:
    query, keys, values = states(length, torch.float64)
    for coded in ([block(1)], [block(1), block(11)], [many()]):
        joined, left = with_decoded(query, prefix(), coded)
        assert left == []
        assert len(joined.keys) == 12 + sum(sum(map(sum, own.held)) for own in coded)
        output = decode_attention(query, prefix(), keys, values, None, 0.3, coded)
        expected = by_hand(query, prefix(), keys, values, coded)
        assert torch.allclose(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_queries_of_other_dtypes_read_the_codes_in_float32(dtype: torch.dtype) -> None:
    query, keys, values = states(50, dtype)
    joined, left = with_decoded(query, prefix(dtype), [many()])
    assert (joined.keys.dtype, left) == (torch.float32, [])
    output = decode_attention(query, prefix(dtype), keys, values, None, 0.3, [many()])
    expected = by_hand(query.double(), prefix(dtype), keys.double(), values.double(), [many()])
    assert output.dtype == dtype
    assert torch.allclose(output.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_what_is_read_in_part_counted_or_done_by_a_kernel_stays_in_codes() -> None:
    query = states(50, torch.float32)[0]
    recalled = block(1, Reading(share=0.5))
    assert with_decoded(query, prefix(), [recalled, block(11)])[1] == [recalled]
    with counting_reads():
        assert len(with_decoded(query, prefix(), [block(1)])[1]) == 1
    assert len(with_decoded(query[:, :, :1], prefix(), [block(1)])[1]) == 1  # the C++ kernel's
    assert len(with_decoded(query.to("meta"), prefix(), [block(1)])[1]) == 1  # another device
