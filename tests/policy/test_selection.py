# SPDX-License-Identifier: Apache-2.0
"""Head level: rankings and the kept entries, against naive Python."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp import ConfigError, PLPHPConfig
from plphp.policy.evidence import LayerScores
from plphp.policy.rankers import at_random, per_head, shared_by_heads
from plphp.policy.selection import Mix, keep_mask, keep_masks


def make_scores(
    segments: list[list[int]], q_heads: int = 4, kv_heads: int = 2, seed: int = 0, **kw: Any
) -> LayerScores:
    """Scores of rows written as image numbers, -1 for text and -2 for padding."""
    segment = torch.tensor(segments)
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(len(segments), q_heads, segment.shape[1], generator=generator)
    return LayerScores(attention, segment.clamp(min=-1), segment != -2, kw.get("layer", 0), kv_heads)


def naive_keep(
    rank: Tensor, segments: list[list[int]], rates: list[float], config: PLPHPConfig
) -> list[list[list[bool]]]:
    result = []
    for row, segment in enumerate(segments):
        images: dict[int, list[int]] = {}
        for position, image in enumerate(segment):
            if image >= 0:
                images.setdefault(image if config.image_quota == "per_image" else 0, []).append(position)
        heads = []
        for head in rank[row].tolist():
            kept = [image == -1 for image in segment]
            for positions in images.values():
                count = min(len(positions), max(config.min_kept, math.floor(rates[row] * len(positions) + 0.5)))
                for position in sorted(positions, key=lambda p: (-head[p], p))[:count]:
                    kept[position] = True
            heads.append(kept)
        result.append(heads)
    return result


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], Tensor, list[float], PLPHPConfig]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    segments = draw(
        st.lists(st.lists(st.integers(-2, 2), min_size=length, max_size=length), min_size=rows, max_size=rows)
    )
    levels = draw(st.sampled_from([2, 1000]))  # two levels: nearly everything is a tie
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rank = torch.randint(levels, (rows, draw(st.integers(1, 3)), length), generator=generator).float()
    rates = draw(st.lists(st.floats(0, 1), min_size=rows, max_size=rows))
    config = PLPHPConfig(image_quota=draw(st.sampled_from(["pooled", "per_image"])), min_kept=draw(st.integers(0, 4)))
    return segments, rank, rates, config


@settings(deadline=None)
@given(batches())
def test_keep_mask_is_the_naive_one(batch: tuple[list[list[int]], Tensor, list[float], PLPHPConfig]) -> None:
    segments, rank, rates, config = batch
    keep = keep_mask(rank, make_scores(segments), rates, config)
    assert keep.dtype is torch.bool
    assert keep.tolist() == naive_keep(rank, segments, rates, config)


@settings(deadline=None)
@given(batches(), st.data(), st.booleans(), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans())
def test_a_lower_rate_keeps_nothing_that_a_higher_one_does_not(
    batch: tuple[list[list[int]], Tensor, list[float], PLPHPConfig],
    data: st.DataObject,
    ragged: bool,
    safeguard: float,
    text: bool,
) -> None:
    """What is dropped before the rates of all layers are known is dropped by them too."""
    segments, rank, rates, config = batch
    config = dataclasses.replace(config, head_safeguard=safeguard)
    lower = [rate * data.draw(st.floats(0, 1)) for rate in rates]
    scores = make_scores(segments)
    if text:
        scores = dataclasses.replace(scores, evictable=scores.valid & (torch.arange(len(segments[0])) % 3 > 0))
    many, few = keep_masks(rank, scores, [rates, lower], config, ragged=ragged)
    assert not (few & ~many).any()


def test_text_is_kept_and_padding_never() -> None:
    scores = make_scores([[-2, -2, -1, 0, 0, -1], [0, -1, 0, -1, -1, -1]])
    for rate in (0.0, 0.5, 1.0):
        keep = keep_mask(per_head(scores, PLPHPConfig()), scores, [rate, rate], PLPHPConfig())
        assert keep[0, :, [2, 5]].all()
        assert keep[1, :, [1, 3, 4, 5]].all()
        assert not keep[0, :, :2].any()


def test_ties_keep_the_earlier_entry() -> None:
    scores = make_scores([[0] * 100])
    keep = keep_mask(torch.zeros(1, 2, 100), scores, [0.3], PLPHPConfig())
    assert keep[0, 0].nonzero()[:, 0].tolist() == list(range(30)) == keep[0, 1].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(("min_kept", "pooled", "per_image"), [(0, 0, 0), (1, 1, 2), (3, 3, 5), (9, 6, 6)])
def test_rate_zero_keeps_min_kept(min_kept: int, pooled: int, per_image: int) -> None:
    scores = make_scores([[0, 0, 1, 1, 1, 1]])
    rank = per_head(scores, PLPHPConfig())
    for quota, expected in (("pooled", pooled), ("per_image", per_image)):
        config = PLPHPConfig(min_kept=min_kept, image_quota=quota)  # type: ignore[arg-type]
        assert keep_mask(rank, scores, [0.0], config).sum(-1).tolist() == [[expected] * 2]


def test_per_image_quota_keeps_a_share_of_an_image_that_nobody_looks_at() -> None:
    scores = make_scores([[0] * 4 + [1] * 4])
    rank = torch.arange(8.0).expand(1, 2, 8)
    pooled = keep_mask(rank, scores, [0.5], PLPHPConfig())
    quota = keep_mask(rank, scores, [0.5], PLPHPConfig(image_quota="per_image"))
    assert pooled[0, 0].nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    assert quota[0, 0].nonzero()[:, 0].tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_each_kv_head_ranks_by_its_own_query_heads(kv_heads: int, reduction: str) -> None:
    scores = make_scores([[0, 0, -1, 1], [-2, -1, 0, 0]], q_heads=6, kv_heads=kv_heads)
    rank = per_head(scores, PLPHPConfig(gqa_reduction=reduction))  # type: ignore[arg-type]
    group = 6 // kv_heads
    for head in range(kv_heads):
        # repeat_kv of transformers: query heads head * group to (head + 1) * group read KV head `head`.
        mine = [scores.attention[:, head * group + i] for i in range(group)]
        expected = sum(mine) / group if reduction == "mean" else torch.stack(mine).max(0).values
        torch.testing.assert_close(rank[:, head], expected)


def test_shared_gives_all_heads_the_mean_over_query_heads() -> None:
    scores = make_scores([[0, 0, -1, 1]], q_heads=6, kv_heads=3)
    rank = shared_by_heads(scores, PLPHPConfig(gqa_reduction="max"))
    assert rank.shape == (1, 3, 4)
    for head in range(3):
        torch.testing.assert_close(rank[0, head], scores.attention[0].mean(0))
    keep = keep_mask(rank, scores, [0.5], PLPHPConfig())
    assert (keep == keep[:, :1]).all()


def test_random_depends_on_seed_layer_and_head_only() -> None:
    def ranks(segments: list[list[int]], row: int = 0, seed: int = 0, layer: int = 0, scores: int = 0) -> Tensor:
        made = make_scores(segments, seed=scores, layer=layer)
        return at_random(made, PLPHPConfig(seed=seed))[row][:, made.vision[row]]

    row = [-1, 0, 0, 0, 1, -1]
    base = ranks([row])
    assert base.unique().numel() == base.numel() == 8
    torch.testing.assert_close(ranks([row], scores=5), base, rtol=0, atol=0)
    torch.testing.assert_close(ranks([[-2] * 3 + row]), base, rtol=0, atol=0)
    torch.testing.assert_close(ranks([[0] * 6, row], row=1), base, rtol=0, atol=0)
    assert not torch.equal(ranks([row], seed=1), base)
    assert not torch.equal(ranks([row], layer=1), base)
    assert not torch.equal(base[0], base[1])


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    at_random(make_scores([[0, 0]]), PLPHPConfig(method="random"))
    assert torch.equal(torch.rand(2), expected)


def test_random_takes_any_valid_seed() -> None:
    scores = make_scores([[0, 0, 0]])
    assert at_random(scores, PLPHPConfig(seed=2**70)).shape == (1, 2, 3)


def test_random_is_uniform_over_positions() -> None:
    scores = make_scores([[0] * 20])
    counts = torch.zeros(20)
    for seed in range(200):
        config = PLPHPConfig(seed=seed)
        counts += keep_mask(at_random(scores, config), scores, [0.5], config)[0].sum(0)
    assert counts.sum() == 200 * 2 * 10
    assert counts.min() > 140
    assert counts.max() < 260


def test_vision_score_is_the_mean_over_heads_of_the_vision_mass() -> None:
    scores = make_scores([[-1, 0, 0, -1], [-2, -1, 1, -1], [-1] * 4], q_heads=3)
    expected = [sum(scores.attention[0, h, [1, 2]].sum() for h in range(3)) / 3]
    expected += [scores.attention[1, :, 2].mean(), torch.tensor(0.0)]
    torch.testing.assert_close(scores.vision_score(), torch.stack(expected))


@settings(deadline=None)
@given(st.integers(1, 30), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_a_mix_keeps_as_many_and_its_parts_are_what_they_say(
    tokens: int, rate: float, first: float, second: float, seed: int
) -> None:
    parts = sorted([first, second])
    mix = Mix(random=parts[0], spread=1 - parts[1])
    scores = make_scores([[-1, *[0] * tokens, -2]], seed=seed)
    config = PLPHPConfig(seed=seed)
    rank = per_head(scores, config)
    keep = keep_mask(rank, scores, [rate], config, mix)
    count = max(1, math.floor(rate * tokens + 0.5))
    assert (keep.sum(-1) == count + 1).all()
    assert not keep[..., -1].any()
    ranked = count - math.floor(mix.random * count + 0.5) - math.floor(mix.spread * count + 0.5)
    for head in range(2):
        best = sorted(range(1, tokens + 1), key=lambda p: -float(rank[0, head, p]))[: max(0, ranked)]
        assert set(best) <= set(keep[0, head].nonzero()[:, 0].tolist())
    assert torch.equal(keep, keep_mask(rank, scores, [rate], config, mix))


@settings(deadline=None)
@given(
    batches(),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.sampled_from([0, 0.3, 1]),
    st.sampled_from([0, 0.5]),
)
def test_several_rates_at_once_are_each_alone(
    batch: tuple[list[list[int]], Tensor, list[float], PLPHPConfig], more: list[float], random: float, spread: float
) -> None:
    segments, rank, rates, config = batch
    scores = make_scores(segments, kv_heads=rank.shape[1])
    mix = Mix(random=(1 - spread) * random, spread=spread)
    several = [rates, *([rate] * len(segments) for rate in more)]
    together = keep_masks(rank, scores, several, config, mix)
    for found, one in zip(together, several, strict=True):
        assert torch.equal(found, keep_mask(rank, scores, one, config, mix))


def test_a_spread_leaves_no_gap_larger_than_its_stride() -> None:
    scores = make_scores([[0] * 60 + [1] * 60])
    keep = keep_mask(per_head(scores, PLPHPConfig()), scores, [0.1], PLPHPConfig(), Mix(spread=1.0))
    positions = [-1, *keep[0, 0].nonzero()[:, 0].tolist(), 120]
    assert len(positions) == 14
    assert max(b - a for a, b in itertools.pairwise(positions)) <= 11


def test_the_random_part_of_a_mix_is_drawn_from_what_the_ranking_leaves() -> None:
    scores = make_scores([[0] * 100])
    rank = torch.arange(100.0).expand(1, 2, 100)
    keep = keep_mask(rank, scores, [0.5], PLPHPConfig(), Mix(random=0.4))
    other = keep_mask(rank, scores, [0.5], PLPHPConfig(seed=1), Mix(random=0.4))
    assert keep[0, :, 70:].all()
    assert (keep.sum(-1) == 50).all()
    assert not torch.equal(keep, other)


def test_candidates_of_text_compete_and_as_many_leave() -> None:
    scores = make_scores([[-2, -1, -1, 0, 0, 0, 0, -1]])
    evictable = torch.tensor([[False, True, True, True, True, True, False, False]])
    scores = dataclasses.replace(scores, evictable=evictable)
    rank = torch.tensor([0.0, 1, 9, 8, 2, 3, 0, 0]).expand(1, 2, 8)
    keep = keep_mask(rank, scores, [0.5], PLPHPConfig())
    assert keep[0, 0].nonzero()[:, 0].tolist() == [2, 3, 5, 6, 7]


@pytest.mark.parametrize("name", ["peak", "best_position", "density", "value_norm", "queries"])
def test_evidence_that_was_not_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=f"scores by '{name}', which its evidence does not ask for"):
        make_scores([[0]]).need(name)
