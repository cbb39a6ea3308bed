# SPDX-License-Identifier: Apache-2.0
"""Coded blocks: encoded, selected, put among other rows, picked for several coders, counted."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from invariants import tensors_of
from plphp.errors import ConfigError
from plphp.kernels.coded import CodedKV, Reading
from plphp.kernels.coded_attention import attend_codes
from plphp.kernels.coded_bytes import index_nbytes, means_nbytes, read_nbytes, read_of_shape, row_nbytes, tier_nbytes
from plphp.kernels.coder import Coder, coded_rows
from plphp.kernels.rungs import RUNGS
from tier_reference import random_books

ROWS, HEADS, SEQ, DIM, VALUE_DIM = 3, 2, 40, 16, 8
BOOKS = random_books(HEADS, DIM, VALUE_DIM, torch.Generator().manual_seed(1))
LADDERS = (("c3",), ("kivi2", "r1"), ("pr2", "rvq", "pq"), ("kivi4", "r3", "pq"))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def states(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, and vision tokens [rows, seq]: all but the first three, and none in the last row of several."""
    vision = torch.arange(SEQ).expand(rows, -1) > 2
    if rows > 1:
        vision = vision & (torch.arange(rows) < rows - 1)[:, None]
    return noise(rows, HEADS, SEQ, DIM), noise(rows, HEADS, SEQ, VALUE_DIM, seed=1), vision


def placement(rows: int, rungs: int, vision: Tensor, seed: int = 2) -> Tensor:
    """Every rung, whole and dropped, dealt out by chance; text is whole."""
    draw = torch.randint(-1, rungs + 1, (rows, HEADS, SEQ), generator=torch.Generator().manual_seed(seed))
    placed = torch.where(draw < 0, 255, draw).to(torch.uint8)
    return placed.masked_fill(~vision[:, None], 255)


def coder(names: tuple[str, ...], reading: Reading | None = None) -> Coder:
    needed = any(RUNGS[name].needs_books for name in names)
    return Coder(tuple(RUNGS[name] for name in names), BOOKS if needed else None, reading or Reading())


def encoded(names: tuple[str, ...], rows: int = ROWS, reading: Reading | None = None) -> CodedKV:
    keys, values, vision = states(rows)
    block = coder(names, reading).encode(keys, values, vision, placement(rows, len(names), vision))
    assert block is not None
    return block


def entries(block: CodedKV, row: int) -> list[list[tuple[Tensor, Tensor]]]:
    """By tier and head, what the codes of a row of the batch stand for; tiers without an entry are left out."""
    result = []
    for tier in block.decoded(torch.float64):
        starts, counts = tier.index[:, row].tolist()
        heads = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        result.append([(tier.keys[head], tier.values[head]) for head in heads])
    return [tier for tier in result if any(len(keys) for keys, _ in tier)]


def assert_same_row(block: CodedKV, row: int, expected: CodedKV, other: int) -> None:
    for tier, own in zip(entries(block, row), entries(expected, other), strict=True):
        for (keys, values), (of_keys, of_values) in zip(tier, own, strict=True):
            assert torch.equal(keys, of_keys)
            assert torch.equal(values, of_values)


@pytest.mark.parametrize("names", LADDERS, ids=str)
def test_a_row_is_encoded_as_if_it_were_alone(names: tuple[str, ...]) -> None:
    block, (keys, values, vision) = encoded(names), states()
    placed = placement(ROWS, len(names), vision)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = coder(names).encode(keys[one], values[one], vision[one], placed[one])
        if row == ROWS - 1:
            assert alone is None  # a row of text alone
            assert sum(block.held[row]) == 0
            continue
        assert alone is not None
        assert_same_row(block, row, alone, 0)
        for number, name in enumerate(names):
            [tier] = [tier for tier in block.tiers if tier.rung.name == name]
            assert tier.counts[row] == tuple((placed[row] == 1 + number).sum(1).tolist())


@pytest.mark.parametrize("names", LADDERS, ids=str)
def test_rows_are_selected_and_put_among_others(names: tuple[str, ...]) -> None:
    block = encoded(names, reading=Reading(0.5))
    for rows in ([2, 1, 0], [1], [1, 1, 0, 1], [0], [2], [1, 0, 0]):
        chosen = block.select(rows)
        assert chosen.rows == tuple(chosen.tiers[-1].rows)
        for row, source in enumerate(rows):
            assert_same_row(chosen, row, block, source)
            assert chosen.held[chosen.rows[row]] == block.held[source]
        assert chosen.nbytes == sum(tensor.nbytes for tensor in tensors_of(chosen))
        assert len(chosen.reading) == len(set(rows))
    among = block.among(2, 1)
    assert among.batch == ROWS + 3
    for row in range(ROWS):
        assert_same_row(among, row + 2, block, row)
        assert row_nbytes(among, row + 2) == row_nbytes(block, row)
    assert [row_nbytes(among, row) for row in (0, 1, 5)] == [0, 0, 0]
    query = noise(among.batch, 4, 3, DIM)
    output, lse = attend_codes(query, among, 0.25)
    alone = attend_codes(query[2:5], block, 0.25)
    assert torch.allclose(output[2:5], alone[0], atol=1e-12)
    assert torch.equal(lse[[0, 1, 5]], torch.full((3, 4, 3), -torch.inf, dtype=torch.float64))
    assert not output[[0, 1, 5]].any()
    assert_same_row(among.select([2, 0]), 0, block, 0)
    copied = copy.deepcopy(block)
    assert copied.tiers[0].keys.streams[0] is not block.tiers[0].keys.streams[0]
    assert_same_row(copied, 1, block, 1)


def test_a_block_that_a_kernel_has_read_is_copied_without_what_it_knows_of_it() -> None:
    """With heads of this width, and a compiler, it is the C++ kernel, which keeps addresses."""
    keys, values = noise(1, HEADS, SEQ, 32).float(), noise(1, HEADS, SEQ, 32, seed=1).float()
    vision = torch.ones(1, SEQ, dtype=torch.bool)
    block = coder(("c3",)).encode(keys, values, vision, torch.ones(1, HEADS, SEQ, dtype=torch.uint8))
    assert block is not None
    query = noise(1, 4, 1, 32).float()
    expected = attend_codes(query, block, 0.25)
    copied = copy.deepcopy(block)
    for stream in (*block.tiers[0].keys.streams, *block.tiers[0].values.streams):
        stream.zero_()
    for found, own in zip(attend_codes(query, copied, 0.25), expected, strict=True):
        assert torch.equal(found, own)


@pytest.mark.parametrize("names", LADDERS, ids=str)
def test_entries_in_another_order_give_the_same_attention(names: tuple[str, ...]) -> None:
    """Within a group of a rung, whose entries share their steps: here all of a head."""
    keys, values, vision = (part[..., :30, :] if part.dim() == 4 else part[:, :30] for part in states(2))
    placed = placement(2, len(names), vision.new_zeros(2, SEQ) | True)[..., :30]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    query = noise(2, 4, 3, DIM)
    for reading in (Reading(), Reading(0.4)):
        own = coder(names, reading)
        block = own.encode(keys, values, vision, placed)
        moved = own.encode(keys[:, :, order], values[:, :, order], vision[:, order], placed[..., order])
        assert block is not None
        assert moved is not None
        if reading.share < 1 and names == ("pr2", "rvq", "pq"):
            continue  # entries whose index is the same tie
        for a, b in zip(attend_codes(query, block, 0.25), attend_codes(query, moved, 0.25), strict=True):
            assert torch.allclose(a, b, atol=1e-10)


def configs() -> list[Coder | None]:
    """Coders of one prompt that share rungs or not, with and without codebooks, and one that codes nothing."""
    readings = [Reading(), Reading(0.3, rest=False), Reading(0.5), Reading()]
    pairs = zip(LADDERS, readings, strict=True)
    return [*(coder(names, reading) for names, reading in pairs), None, coder(("r1", "kivi2"), Reading(0.5))]


def test_rows_of_several_coders_are_what_each_would_make() -> None:
    keys, values, vision = states(1)
    coders = configs()
    placed = torch.cat(
        [placement(1, len(own.rungs), vision, seed) if own else torch.full((1, HEADS, SEQ), 255, dtype=torch.uint8)
         for seed, own in enumerate(coders)]
    )  # fmt: skip
    blocks = coded_rows(keys, values, vision, placed, coders)
    assert len(blocks) == 2  # with codebooks, and without
    query = noise(len(coders), 4, 3, DIM)
    for row, own in enumerate(coders):
        holding = [block for block in blocks if sum(block.held[block.rows[row]])]
        if own is None:
            assert not holding
            continue
        [block] = holding
        alone = own.encode(keys, values, vision, placed[row : row + 1])
        assert alone is not None
        assert block.reading[block.rows[row]] == own.reading
        found = {
            tier.rung: (tier, decoded) for tier, decoded in zip(block.tiers, block.decoded(torch.float64), strict=True)
        }
        for tier, decoded in zip(alone.tiers, alone.decoded(torch.float64), strict=True):
            of_row, of_block = found[tier.rung]
            assert of_row.counts[block.rows[row]] == tier.counts[0]
            some = of_row.entries_of(block.rows[row])
            assert torch.equal(of_block.keys[some], decoded.keys)
            assert torch.equal(of_block.values[some], decoded.values)
        if own.rungs[0].needs_books and own.reading.share < 1:
            continue  # entries whose index is the same tie, and go by the order of tiers
        output, lse = (part[row] for part in attend_codes(query, block, 0.25))
        expected, of_alone = (part[0] for part in attend_codes(query[row : row + 1], alone, 0.25))
        assert torch.allclose(output, expected, atol=1e-10)
        assert torch.allclose(lse, of_alone, atol=1e-10)


@pytest.mark.parametrize("names", LADDERS, ids=str)
def test_rows_of_several_coders_code_what_one_of_them_holds(names: tuple[str, ...]) -> None:
    """Text is not coded, whatever is in it, nor is a head that holds nothing."""
    keys, values, vision = states(1)
    placed = torch.cat([placement(1, len(names), vision, seed) for seed in range(3)])
    placed[:, 1] = 0
    expected = coded_rows(keys, values, vision, placed, [coder(names)] * 3)
    for part in (keys, values):
        part[:, 0, 0], part[:, 1] = torch.nan, 1e9
    found = coded_rows(keys, values, vision, placed, [coder(names)] * 3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.held == theirs.held
        for a, b in zip(ours.decoded(torch.float64), theirs.decoded(torch.float64), strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


def test_a_row_that_leaves_out_the_rest_takes_it_from_no_other() -> None:
    """The mean value of what stands in is there if any row asks for it, whatever the row that reads least says."""
    keys, values, vision = states(1)
    least, most = coder(("kivi2",), Reading(0.2, rest=False)), coder(("kivi2",), Reading(0.5))
    placed = torch.ones(2, HEADS, SEQ, dtype=torch.uint8)
    [block] = coded_rows(keys, values, vision, placed, [least, most])
    query = noise(2, 4, 1, DIM)
    output, lse = attend_codes(query, block, 0.25)
    for row, own in enumerate((least, most)):
        alone = own.encode(keys, values, vision, placed[:1])
        assert alone is not None
        expected = attend_codes(query[row : row + 1], alone, 0.25)
        assert torch.allclose(output[row], expected[0][0], atol=1e-12)
        assert torch.allclose(lse[row], expected[1][0], atol=1e-12)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("names", LADDERS, ids=str)
def test_bytes_are_those_of_the_live_tensors(names: tuple[str, ...], share: float) -> None:
    block = encoded(names, reading=Reading(share)).select([1, 0])
    live = sum(tensor.nbytes for tensor in tensors_of(block))
    assert block.nbytes == live
    for tier in block.tiers:
        own = sum(tensor.nbytes for tensor in (*tensors_of(tier.keys), *tensors_of(tier.values)))
        assert tier.nbytes == own == sum(tier_nbytes(tier, row) for row in range(2))
        index = tier.keys.streams[0].nbytes
        if not tier.rung.keys.centred or not tier.rung.keys.books:
            index += sum(part.nbytes for part in (tier.keys.scales, tier.keys.groups) if part is not None)
        assert sum(index_nbytes(tier, row) for row in range(2)) == index
    means = sum(mean.nbytes for mean in (*block.means, block.rest_values) if mean is not None)
    assert means_nbytes(block, 0) + means_nbytes(block, 1) == means
    read = [read_nbytes(block, row) for row in range(2)]
    held = [row_nbytes(block, row) for row in range(2)]
    assert sum(held) == live
    assert read == held if share == 1 else all(0 < a < b for a, b in zip(read, held, strict=True))
    if share < 1:
        none, every = ([0.0] * len(block.tiers), [float(sum(tier.counts[1])) for tier in block.tiers])
        assert read_nbytes(block, 0, every) == pytest.approx(held[0])
        index = sum(index_nbytes(tier, 1) for tier in block.tiers)
        assert read_nbytes(block, 0, none) == means_nbytes(block, 1) + index


@pytest.mark.parametrize("names", [("r3", "pr2"), ("pr2", "r3"), ("c3", "r2"), ("r4", "kivi2")], ids=str)
def test_the_most_that_is_read_is_that_of_an_estimate(names: tuple[str, ...]) -> None:
    """Whether it comes from tensors or from shapes: scales of keys that belong to the index make no entry heavier."""
    keys, values, vision = states(1)
    placed = torch.arange(SEQ).expand(1, HEADS, -1) % 2 + 1
    own = coder(names, Reading(0.3))
    block = own.encode(keys, values, vision, placed.to(torch.uint8))
    assert block is not None
    estimated = HEADS * read_of_shape(dict.fromkeys(own.rungs, SEQ // 2), own.reading, DIM, VALUE_DIM)
    assert read_nbytes(block, 0) - means_nbytes(block, 0) == pytest.approx(estimated)


def test_means_are_those_of_the_vision_tokens_of_rows_that_are_coded() -> None:
    keys, values, vision = states(2)
    vision[1] = vision[0]
    keys[1, 0, 5] = torch.nan  # a row that cannot be ranked is kept whole, whatever is in it
    placed = placement(2, 1, vision)
    placed[1] = 255
    block = coder(("r3",)).encode(keys, values, vision, placed)
    assert block is not None
    for mean, own in zip(block.means, (keys, values), strict=True):
        assert mean is not None
        expected = own[0][:, 3:].mean(1)
        assert torch.equal(mean[:HEADS], expected.to(torch.float16))
        assert not mean[HEADS:].any()


def test_nothing_is_stored_where_nothing_is_coded() -> None:
    keys, values, vision = states()
    for value in (0, 255):
        assert (
            coder(("c3",)).encode(keys, values, vision, torch.full((ROWS, HEADS, SEQ), value).to(torch.uint8)) is None
        )
    assert coded_rows(keys[:1], values[:1], vision[:1], placement(1, 1, vision[:1]), [None]) == ()
    block = encoded(("pr2", "c3"))
    only = coder(("pr2", "c3")).encode(keys, values, vision, torch.full((ROWS, HEADS, SEQ), 2).to(torch.uint8))
    assert block.books is not None
    assert only is not None
    assert only.books is None
    assert only.key_means is None


@pytest.mark.parametrize("change", [{"kv_heads": 4}, {"dim": 8}, {"value_dim": 16}], ids=str)
def test_codebooks_of_another_model_are_refused(change: dict[str, Any]) -> None:
    sizes = {"kv_heads": HEADS, "dim": DIM, "value_dim": VALUE_DIM, **change}
    books = random_books(**sizes, generator=torch.Generator())
    keys, values, vision = states(1)
    wrong = dataclasses.replace(coder(("pq",)), books=books)
    placed = placement(1, 1, vision)
    with pytest.raises(ConfigError, match=r"The codebooks are of .* and this model has 2 with 16 and 8"):
        wrong.encode(keys, values, vision, placed)
    with pytest.raises(ConfigError, match=r"The codebooks are of .* and this model has 2 with 16 and 8"):
        coded_rows(keys, values, vision, placed, [wrong])
