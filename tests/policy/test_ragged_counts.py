# SPDX-License-Identifier: Apache-2.0
"""KV heads that compete for the places of their layer, against naive Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp import ConfigError, PLPHPConfig
from plphp.methods.registry import available_methods, resolve
from plphp.policy.evidence import LayerScores
from plphp.policy.selection import Mix, keep_mask, keep_masks, ragged_counts


def scores_of(segment: list[int], heads: int) -> LayerScores:
    """Scores of a row that is written as image numbers, -1 for text and -2 for padding."""
    row = torch.tensor([segment])
    return LayerScores(torch.zeros(1, heads, len(segment)), row.clamp(min=-1), row != -2, 0, heads)


def naive_counts(score: list[list[float]], each: int, safe: int) -> list[int]:
    """AdaKV's budgets by hand: the best of each head first, then the best of what is left of all heads."""
    entries = range(len(score[0]))
    best = [sorted(entries, key=lambda entry, own=own: (-own[entry], entry)) for own in score]
    taken = [list(own[:safe]) for own in best]
    rest = [(-score[head][entry], entry, head) for head, own in enumerate(best) for entry in own[safe:]]
    for _, entry, head in sorted(rest)[: len(score) * (each - safe)]:
        taken[head].append(entry)
    return [len(own) for own in taken]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    heads, entries = draw(st.integers(1, 5)), draw(st.integers(1, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([2, 1000]))  # two levels: nearly everything is a tie
    score = torch.randint(levels, (heads, entries), generator=generator).float()
    score = score * torch.logspace(0, draw(st.sampled_from([0, 3])), heads)[:, None]  # heads that are worth more
    each = draw(st.integers(0, entries))
    return score, each, draw(st.integers(0, each))


@settings(deadline=None)
@given(layers())
def test_counts_are_the_naive_ones(layer: tuple[Tensor, int, int]) -> None:
    score, each, safe = layer
    [counts] = ragged_counts(score, [each], [safe])
    assert counts.tolist() == naive_counts(score.tolist(), each, safe)
    assert counts.sum() == each * len(score)
    assert counts.min() >= safe
    assert counts.max() <= score.shape[1]


@settings(deadline=None)
@given(layers(), st.floats(0, 1), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1))
def test_what_is_kept_at_a_rate_is_kept_at_every_higher_one(
    layer: tuple[Tensor, int, int], safeguard: float, min_kept: int, first: float, second: float
) -> None:
    score = layer[0]
    scores = scores_of([0] * score.shape[1], len(score))
    config = PLPHPConfig(head_safeguard=safeguard, min_kept=min_kept)
    fewer, more = keep_masks(score[None], scores, [[min(first, second)], [max(first, second)]], config, ragged=True)
    assert not (fewer & ~more).any()


@settings(deadline=None)
@given(layers(), st.floats(0, 1), st.integers(0, 4), st.floats(0, 1), st.sampled_from(["pooled", "per_image"]))
def test_each_head_keeps_its_best_and_the_layer_as_much_as_with_equal_heads(
    layer: tuple[Tensor, int, int], safeguard: float, min_kept: int, rate: float, quota: Any
) -> None:
    score, entries = layer[0], layer[0].shape[1]
    segment = [*([0] * (entries // 2)), *([1] * (entries - entries // 2)), -1, -2]
    scores = scores_of(segment, len(score))
    score = torch.nn.functional.pad(score, (0, 2), value=9e9)[None]
    config = PLPHPConfig(head_safeguard=safeguard, min_kept=min_kept, image_quota=quota)
    ragged = keep_mask(score, scores, [rate], config, ragged=True)[0]
    equal = keep_mask(score, scores, [rate], config)[0]
    assert ragged.sum() == equal.sum()
    assert ragged[:, -2].all()
    assert not ragged[:, -1].any()
    images = [0, 1] if quota == "per_image" else [slice(None)]
    for image in images:
        here = [position for position, number in enumerate(segment) if number >= 0 and image in (number, slice(None))]
        assert ragged[:, here].sum() == equal[:, here].sum()
        for head in range(len(ragged)):
            kept = ragged[head, here]
            assert int(kept.sum()) >= min(min_kept, len(here))
            if kept.any() and not kept.all():
                own = score[0, head, here]
                assert own[kept].min() >= own[~kept].max()


def test_a_safeguard_of_1_makes_heads_equal() -> None:
    score = torch.arange(24.0).view(1, 3, 8)
    scores = scores_of([0] * 8, 3)
    whole, none = PLPHPConfig(head_safeguard=1.0), PLPHPConfig(head_safeguard=0.0, min_kept=0)
    assert keep_mask(score, scores, [0.5], whole, ragged=True)[0].sum(-1).tolist() == [4, 4, 4]
    assert keep_mask(score, scores, [0.5], none, ragged=True)[0].sum(-1).tolist() == [0, 4, 8]


@pytest.mark.parametrize("mix", [Mix(random=0.5), Mix(spread=0.5), Mix(0.25, 0.25)], ids=str)
def test_parts_that_do_not_go_by_score_are_shares_of_what_a_head_keeps(mix: Mix) -> None:
    score = torch.stack([torch.arange(20.0), 100 + torch.arange(20.0)])[None]
    scores = scores_of([0] * 20, 2)
    config = PLPHPConfig(head_safeguard=0.2)
    counts = keep_mask(score, scores, [0.5], config, ragged=True)[0].sum(-1)
    keep = keep_mask(score, scores, [0.5], config, mix, ragged=True)[0]
    assert torch.equal(keep.sum(-1), counts)
    assert counts.tolist() == [2, 18]
    assert keep[1, 11:].all()  # the better half of the 18 goes by score


def test_ragged_heads_are_refused_where_scores_say_nothing_of_heads() -> None:
    refused = {name for name, method in available_methods().items() if method.kv is None or not method.kv.heads_compare}
    assert {"random", "shared", "fastv", "vtw"} <= refused
    for name in refused:
        with pytest.raises(ConfigError, match=f"'{name}' has no scores by which KV heads could compete"):
            resolve(PLPHPConfig(method=name, heads="ragged"))
        resolve(PLPHPConfig(method=name, heads="equal"))


def test_a_config_that_leaves_heads_open_has_the_methods_own() -> None:
    for method in available_methods().values():
        if method.kv is not None:
            assert method.kv.ragged(PLPHPConfig(method=method.name)) == (method.kv.heads == "ragged")
            assert not method.kv.ragged(PLPHPConfig(method=method.name, heads="equal"))
            assert method.kv.ragged(PLPHPConfig(method=method.name, heads="ragged"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": "both"}, "heads must be one of 'equal', 'ragged', got 'both'"),
        ({"head_safeguard": 1.5}, "head_safeguard must be between 0 and 1, got 1.5"),
        ({"head_safeguard": "much"}, "head_safeguard must be a number between 0 and 1, got 'much'"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PLPHPConfig(**values)
