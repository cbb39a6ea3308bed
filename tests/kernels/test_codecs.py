# SPDX-License-Identifier: Apache-2.0
"""Codecs against what is worked out entry by entry: errors of half a step, nearest centroids, groups of any size."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.kernels.books import LayerBooks
from plphp.kernels.centred import CLIPS, Centred
from plphp.kernels.centroids import nearest
from plphp.kernels.codecs import Affine, Codec, Codes, Places
from plphp.kernels.hadamard import hadamard
from plphp.kernels.rungs import RUNGS, Rung
from plphp.settings.ladder import PLAIN_RUNGS, PRODUCT_RUNGS
from tier_reference import random_books

DIMS = (8, 16, 24, 32, 80, 96, 128)
HALF = 2.0**-11
"""Relative error of rounding to float16."""
TINY = 2.0**-25
"""Absolute error of rounding the least numbers to float16."""
COUNTS = (5, 0, 1, 40)
"""Entries of two rows of two heads: fewer than a group, none, a single one, and more than a group of 32."""


def noise(entries: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(entries, dim, generator=torch.Generator().manual_seed(seed)).double()


def places(
    states: Tensor, counts: tuple[int, ...] = COUNTS, books: LayerBooks | None = None, mean: Tensor | None = None
) -> Places:
    """Places of the entries of two KV heads."""
    pair = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    place = torch.cat([torch.arange(count) for count in counts])
    of_pairs = torch.zeros(len(counts), states.shape[1]) if mean is None else mean
    return Places(pair, place, counts, 2, of_pairs.to(torch.float16), None if books is None else books.keys)


def coded(codec: Codec, states: Tensor, where: Places) -> tuple[Codes, Tensor]:
    """Codes, and what they stand for."""
    codes = codec.encode(states, where)
    return codes, codec.decode(codes, where, torch.float64)


def parts_of(codec: Affine, states: Tensor, counts: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Entries and channels, int64 each, of the numbers that share a step."""
    entries, channels = torch.arange(len(states)), torch.arange(states.shape[1])
    if codec.axis == "token":
        width = next(size for size in (32, 16, 8) if states.shape[1] % size == 0)
        return [(entry[None], part) for entry in entries for part in channels.split(width)]
    starts = accumulate(counts, initial=0)
    pairs = [entries[start : start + count] for start, count in zip(starts, counts, strict=False) if count]
    return [(group, channel[None]) for pair in pairs for group in pair.split(codec.group) for channel in channels]


def assert_within_half_a_step(codec: Affine, states: Tensor, counts: tuple[int, ...]) -> None:
    """No number is further off than half a step, or than float16 takes the ends of the steps away from it."""
    _, result = coded(codec, states, places(states, counts))
    steps = 2**codec.width - 1
    for entries, channels in parts_of(codec, states, counts):
        part = states[entries][:, channels]
        low, high = part.min().item(), part.max().item()
        of_low = abs(low) * HALF + TINY
        of_step = (high - low + of_low) * HALF + steps * 2 * TINY  # the least step is 2 * TINY, and counts so often
        half = (high - low + of_low) / steps * (1 + HALF) / 2 + TINY
        error = (result[entries][:, channels] - part).abs().max().item()
        assert error <= max(half, of_low, of_step) * (1 + 1e-12), (entries, channels, low, high)


AFFINE = [Affine(width, "channel", group) for width in (2, 3, 4) for group in (32, 256)]
AFFINE += [Affine(width, "token") for width in (2, 4)]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(AFFINE),
    st.sampled_from((8, 24, 32)),
    st.lists(st.integers(0, 40), min_size=2, max_size=4).filter(any),
    st.sampled_from((1e-7, 1e-3, 1.0, 300.0)),
    st.sampled_from((0.0, 100.0, -1e4)),
    st.integers(0, 2**32),
)
def test_the_error_is_half_a_step(
    codec: Affine, dim: int, counts: list[int], size: float, bias: float, seed: int
) -> None:
    states = noise(sum(counts), dim, seed) * size
    states[:, ::3] += bias
    assert_within_half_a_step(codec, states, tuple(counts))


@pytest.mark.parametrize("codec", AFFINE, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_the_error_is_half_a_step_in_heads_of_all_widths(codec: Affine, dim: int) -> None:
    assert_within_half_a_step(codec, noise(sum(COUNTS), dim), COUNTS)


@pytest.mark.parametrize("codec", AFFINE, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.1, 100.03, 6e4])
def test_constant_channels(codec: Affine, value: float) -> None:
    states = torch.full((sum(COUNTS), 32), value, dtype=torch.float64)
    _, result = coded(codec, states, places(states))
    assert (result - states).abs().max() <= abs(value) * HALF + 2**codec.width * 2 * TINY
    assert_within_half_a_step(codec, states, COUNTS)


@pytest.mark.parametrize("codec", [*AFFINE, Centred(width=1)], ids=str)
def test_what_codes_stand_for_has_the_same_codes(codec: Codec) -> None:
    states = noise(sum(COUNTS), 32)
    where = places(states, mean=noise(4, 32, seed=9))
    codes, result = coded(codec, states, where)
    again, twice = coded(codec, result, where)
    assert torch.allclose(result, twice, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(codes.streams, again.streams, strict=True))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_index_is_the_middle_of_the_codes_with_the_same_first_bit(axis: str, width: int) -> None:
    codec = Affine(width, "channel", 32) if axis == "channel" else Affine(width, "token")
    states = noise(sum(COUNTS), 16)
    where = places(states)
    codes, result = coded(codec, states, where)
    blank = [torch.zeros_like(codes.streams[0]), torch.full_like(codes.streams[0], 255)]
    ends = [
        codec.decode(replace(codes, streams=(codes.streams[0], *[end] * (width - 1))), where, torch.float64)
        for end in blank
    ]
    first = codec.index(replace(codes, streams=codes.streams[:1]), where, torch.float64)
    assert torch.allclose(first, sum(ends) / 2, atol=1e-12)
    assert ((result - ends[0]) >= -1e-12).all()
    assert ((ends[1] - result) >= -1e-12).all()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rung", ["pq", "rvq", "pq16"])
def test_centroids_are_the_nearest(rung: str, dim: int) -> None:
    if rung == "pq16" and dim % 16:
        pytest.skip("parts of 16 channels")
    books = random_books(2, dim, dim, torch.Generator().manual_seed(1))
    states, mean = noise(sum(COUNTS), dim), noise(4, dim, seed=2)
    where, codec = places(states, books=books, mean=mean), RUNGS[rung].keys
    codes, result = coded(codec, states, where)
    rest = states - where.means.double()[where.pair]
    stands_for = states - rest
    for name, stream in zip(codec.books, codes.streams, strict=True):
        book = getattr(books.keys, name).double()
        assert stream.shape == (len(states), book.shape[1])
        for number, own in enumerate(stream.tolist()):
            head = int(where.pair[number]) % 2
            for part, centroid in enumerate(own):
                width = book.shape[3]
                channels = slice(width * part, width * (part + 1))
                distance = (rest[number, channels] - book[head, part]).square().sum(1)
                assert distance[centroid] <= distance.min() + 1e-12
                rest[number, channels] -= book[head, part, centroid]
                stands_for[number, channels] += book[head, part, centroid]
    assert torch.allclose(result, stands_for, atol=1e-12)
    first = replace(codes, streams=codes.streams[:1])
    pq = Centred(codec.books[:1])
    assert torch.allclose(codec.index(codes, where, torch.float64), pq.decode(first, where, torch.float64), atol=1e-12)
    if len(codec.books) == 1:
        assert torch.equal(codec.encode(result, where).streams[0], codes.streams[0])


def test_centroids_are_the_same_whoever_is_beside_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    books = random_books(2, 16, 16, torch.Generator().manual_seed(1))
    states = noise(46, 16)
    head = places(states).head
    together = nearest(states, books.keys.fine.double(), head)
    monkeypatch.setattr("plphp.kernels.centroids.AT_ONCE", 1)
    assert torch.equal(nearest(states, books.keys.fine.double(), head), together)


@pytest.mark.parametrize("dim", DIMS)
def test_hadamard_is_a_rotation(dim: int) -> None:
    matrix = hadamard(dim, torch.float64, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix, torch.eye(dim, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, matrix.T)
    block = next(size for size in (128, 64, 32, 16, 8) if dim % size == 0)
    assert torch.allclose(matrix[:block, :block].abs(), torch.full((block, block), block**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_rotated_codes_are_the_best_of_all_clips(width: int, dim: int) -> None:
    states, mean = noise(sum(COUNTS), dim), noise(4, dim, seed=2)
    states[3] = 0
    where, codec = places(states, mean=mean), Centred(width=width)
    codes, result = coded(codec, states, where)
    assert [stream.shape for stream in codes.streams] == [(len(states), dim // 8)] * width
    assert codes.scales is not None
    assert codes.scales.shape == (len(states), 1)
    rotated = (states - where.means.double()[where.pair]) @ hadamard(dim, torch.float64, torch.device("cpu"))
    for number, row in enumerate(rotated):
        error = (result[number] - states[number]).square().sum().item()
        half = 2 ** (width - 1)
        if width == 1:
            levels = row.abs().mean() * torch.tensor([-1.0, 1.0])
            candidates = [levels]
        else:
            steps = [float((row.abs().max() * clip / half).to(torch.float16)) for clip in CLIPS]
            candidates = [(torch.arange(2 * half) - half + 0.5).double() * step for step in steps]
        best = min((row[:, None] - levels).abs().amin(1).square().sum().item() for levels in candidates)
        assert error <= best * (1 + 1e-3) + dim * TINY
    signs = codec.index(codes, where, torch.float64) - where.means.double()[where.pair]
    signs = signs @ hadamard(dim, torch.float64, torch.device("cpu"))
    clear = rotated.abs() > 1e-6
    assert torch.equal(signs.sign()[clear], rotated.sign()[clear])


def codecs(dim: int) -> list[Codec]:
    rungs = [rung for name, rung in RUNGS.items() if name != "pq16" or dim % 16 == 0]
    return [codec for rung in rungs for codec in (rung.keys, rung.values)]


@pytest.mark.parametrize("dim", DIMS)
def test_bits_are_those_that_are_stored(dim: int) -> None:
    """With groups that are full; the means of a prompt and the codebooks are not of an entry."""
    books = random_books(2, dim, dim, torch.Generator().manual_seed(1))
    for codec in codecs(dim):
        full = 2 * (codec.group or 5)
        states = noise(2 * full, dim)
        codes = codec.encode(states, places(states, (full, full), books, torch.zeros(2, dim)))
        assert codes.nbytes * 8 == pytest.approx(codec.bits(dim) * states.numel())


@pytest.mark.parametrize("bias", [100.0, -100.0])
@pytest.mark.parametrize("rung", sorted(RUNGS))
def test_a_bias_of_a_channel_costs_keys_nothing(rung: str, bias: float) -> None:
    """Keys of Qwen have some: per channel, or less the mean, what is left is as well coded as without it."""
    counts = (60, 60)
    books = random_books(2, 64, 64, torch.Generator().manual_seed(1))
    states = noise(120, 64)
    biased = states.clone()
    biased[:, [1, 17, 40]] += bias
    codec, errors = RUNGS[rung].keys, []
    for own in (states, biased):
        mean = torch.stack([part.mean(0) for part in own.split(60)])
        _, result = coded(codec, own, places(own, counts, books, mean))
        errors.append((result - own).square().mean().sqrt().item())
    assert errors[1] <= errors[0] * 1.05 + abs(bias) * HALF
    assert errors[0] < 1.2


@pytest.mark.parametrize(
    ("codec", "bad"),
    [(codec, bad) for codec in (Affine(3, "channel", 256), Affine(4, "token")) for bad in (torch.nan, torch.inf, -7e4)]
    + [(Centred(width=3), bad) for bad in (torch.nan, torch.inf, 3e6)],
    ids=str,
)
def test_what_float16_cannot_hold_is_refused(codec: Codec, bad: float) -> None:
    states = noise(sum(COUNTS), 16)
    states[3, 5] = bad
    with pytest.raises(UnsupportedFeatureError, match=r"float16, and these are NaN or beyond .* the method 'none'"):
        codec.encode(states, places(states))


def test_a_rung_says_what_it_cannot_hold() -> None:
    books = random_books(2, 8, 8, torch.Generator())
    with pytest.raises(
        UnsupportedFeatureError, match=r"multiple of 8, and this model has 12 and 8: take the method 'none'"
    ):
        RUNGS["c3"].check(12, 8, None)
    with pytest.raises(UnsupportedFeatureError, match="'pq' needs codebooks, and no codebooks are given"):
        RUNGS["pq"].check(8, 8, None)
    with pytest.raises(UnsupportedFeatureError, match="'pq16' needs codebooks, and the codebooks have no coarse"):
        RUNGS["pq16"].check(8, 8, books)
    RUNGS["pq"].check(8, 8, books)
    with pytest.raises(ConfigError, match="2 KV heads with keys of 8 and values of 8 channels, and this model has 4"):
        books.check(4, 8, 8)


def test_ladders_know_the_rungs_without_torch() -> None:
    assert {name for name, rung in RUNGS.items() if rung.needs_books} == set(PRODUCT_RUNGS)
    assert {name for name, rung in RUNGS.items() if not rung.needs_books} == set(PLAIN_RUNGS)
    for name, bits in (PLAIN_RUNGS | PRODUCT_RUNGS).items():
        assert RUNGS[name].bits(128) == pytest.approx(bits, abs=0.01), name


def test_groups_of_keys_and_values_have_one_size() -> None:
    with pytest.raises(ValueError, match="the rung 'mixed' has 32 and 64"):
        Rung("mixed", Affine(3, "channel", 32), Affine(3, "channel", 64))
    for keys, values, group in ((Affine(3, "channel", 32), Centred(width=3), 32), (Centred(width=3),) * 2 + (0,)):
        assert Rung("mixed", keys, values).group == group
