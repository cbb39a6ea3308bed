# SPDX-License-Identifier: Apache-2.0
"""Layer level: the class rule, the quantile mode, and the number of tokens that a rate keeps."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plphp import PLPHPConfig
from plphp.policy import allocation
from plphp.policy.allocation import RowAllocation, ScoredLayer, kept_count
from plphp.policy.evidence import LayerScores

gammas = st.floats(0, 1)

NOTHING_ELSE = LayerScores(*[torch.zeros(0)] * 3, 0, 1)


def layers_of(scores: list[list[float]]) -> list[ScoredLayer]:
    """Layers of which only the vision attention scores are known."""
    return [ScoredLayer(index, len(scores), layer, NOTHING_ELSE) for index, layer in enumerate(scores)]


def by_vision_attention(scores: list[list[float]], config: PLPHPConfig) -> list[list[RowAllocation]]:
    return allocation.by_vision_attention(layers_of(scores), config)


def uniform(scores: list[list[float]], config: PLPHPConfig) -> list[list[RowAllocation]]:
    return allocation.uniform(layers_of(scores), config)


def keep_all(scores: list[list[float]], config: PLPHPConfig) -> list[list[RowAllocation]]:
    return allocation.keep_all(layers_of(scores), config)


def rates(allocation: list) -> list[list[float]]:
    return [[one.rate for one in layer] for layer in allocation]


def classes(allocation: list) -> list[str]:
    return [layer[0].layer_class for layer in allocation]


def test_class_rule_at_and_beside_the_thresholds() -> None:
    config = PLPHPConfig(retention_rate=0.4, retention_delta=0.3, attentive_threshold=0.25, indifferent_threshold=0.1)
    below = [math.nextafter(0.25, 0), math.nextafter(0.1, 0)]
    scores = [[0.25], [below[0]], [0.1], [below[1]], [1.0], [0.0]]
    result = by_vision_attention(scores, config)
    assert classes(result) == ["attentive", "balanced", "balanced", "indifferent", "attentive", "indifferent"]
    assert [layer[0].rate for layer in result] == pytest.approx([0.7, 0.4, 0.4, 0.1, 0.7, 0.1])
    assert [[one.vision_score for one in layer] for layer in result] == scores


@given(st.lists(gammas, min_size=1, max_size=12), st.sampled_from(["t15", "t10", "t5", "r15", "whole=.3"]))
def test_a_ladder_is_the_mean_over_the_layers(scores: list[float], tiers: str) -> None:
    """As `target_retention` is; thresholds, which fit no prompt in particular, would hold more or less."""
    config = PLPHPConfig(tiers=tiers)
    result = by_vision_attention([[score] for score in scores], config)
    kept = [layer[0].rate for layer in result]
    assert sum(kept) / len(kept) == pytest.approx(config.base_rate)
    assert result == by_vision_attention([[score] for score in scores], PLPHPConfig(target_retention=config.base_rate))


def test_equal_thresholds_leave_no_balanced_layer() -> None:
    config = PLPHPConfig(attentive_threshold=0.3, indifferent_threshold=0.3)
    assert classes(by_vision_attention([[0.3], [0.29]], config)) == ["attentive", "indifferent"]


def test_rates_stay_in_range_where_the_sum_is_not_exact() -> None:
    config = PLPHPConfig(retention_rate=0.7, retention_delta=0.3)  # 0.7 + 0.3 may be above 1
    assert rates(by_vision_attention([[1.0], [0.0]], config)) == [[1.0], [pytest.approx(0.4)]]
    config = PLPHPConfig(retention_rate=0.3, retention_delta=0.3 + 1e-12)
    assert rates(by_vision_attention([[0.0]], config)) == [[0.0]]


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.floats(0, 1, exclude_min=True),
    st.floats(0.01, 0.5),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_target_retention_is_the_mean_over_layers_of_every_row(
    layers: int, rows: int, target: float, quantile: float, seed: int, ties: bool
) -> None:
    """Also for one layer, which is balanced, and for two, of which a quantile of 0.25 or less classes none."""
    values = [[((seed + 7 * i * i + 3 * j) % (3 if ties else 101)) / 101 for j in range(rows)] for i in range(layers)]
    config = PLPHPConfig(target_retention=target, class_quantile=quantile)
    result = by_vision_attention(values, config)
    for row in range(rows):
        assert sum(layer[row].rate for layer in result) / layers == pytest.approx(target, abs=1e-12)
        for upper in result:
            for lower in result:
                if upper[row].vision_score > lower[row].vision_score:
                    assert upper[row].rate >= lower[row].rate - 1e-12


@pytest.mark.parametrize(
    ("layers", "quantile", "share"),
    [(1, 0.5, 0), (2, 0.5, 1), (2, 0.25, 0), (3, 1 / 3, 1), (3, 0.5, 1), (9, 1 / 3, 3)],
)
def test_quantile_classes_as_many_layers_up_as_down(layers: int, quantile: float, share: int) -> None:
    config = PLPHPConfig(target_retention=0.5, class_quantile=quantile)
    named = classes(by_vision_attention([[i / 10] for i in range(layers)], config))
    assert named == ["indifferent"] * share + ["balanced"] * (layers - 2 * share) + ["attentive"] * share


def test_ties_in_quantile_mode_go_to_the_earlier_layer() -> None:
    config = PLPHPConfig(target_retention=0.5, class_quantile=0.5)
    assert classes(by_vision_attention([[0.2]] * 4, config)) == ["attentive"] * 2 + ["indifferent"] * 2


@given(
    st.integers(1, 3).flatmap(lambda rows: st.lists(st.lists(gammas, min_size=rows, max_size=rows), min_size=1)),
    st.floats(0, 1, exclude_min=True),
    st.floats(0.01, 0.5),
    st.booleans(),
)
def test_the_first_layers_alone_have_the_most_that_each_can_keep(
    scores: list[list[float]], target: float, quantile: float, ties: bool
) -> None:
    """And all of that together is never more than what the whole prompt keeps in the end."""
    layers = layers_of([[round(gamma, 1) if ties else gamma for gamma in row] for row in scores])
    config = PLPHPConfig(target_retention=target, class_quantile=quantile)
    final = rates(allocation.by_vision_attention(layers, config))
    before = [[1.0] * len(scores[0]) for _ in scores]
    for read in range(1, len(layers) + 1):
        most = rates(allocation.by_vision_attention(layers[:read], config))
        for layer in range(read):
            for row in range(len(scores[0])):
                assert final[layer][row] <= most[layer][row] <= before[layer][row]
        for row in range(len(scores[0])):
            assert sum(layer[row] for layer in most) <= sum(layer[row] for layer in final) + 1e-9
        before[:read] = most
    assert most == final


@given(
    st.integers(1, 4).flatmap(lambda rows: st.lists(st.lists(gammas, min_size=rows, max_size=rows), min_size=1)),
    st.sampled_from([None, 0.3, 0.5]),
)
def test_rows_decide_on_their_own(scores: list[list[float]], target: float | None) -> None:
    config = PLPHPConfig(target_retention=target)
    together = by_vision_attention(scores, config)
    for row in range(len(scores[0])):
        alone = by_vision_attention([[layer[row]] for layer in scores], config)
        assert [layer[row] for layer in together] == [layer[0] for layer in alone]


@given(st.lists(st.lists(gammas, min_size=2, max_size=2)), st.floats(0, 1))
def test_controls_have_one_rate(scores: list[list[float]], rate: float) -> None:
    config = PLPHPConfig(retention_rate=rate)
    assert rates(uniform(scores, config)) == [[rate, rate] for _ in scores]
    assert rates(keep_all(scores, config)) == [[1.0, 1.0] for _ in scores]
    assert [[one.vision_score for one in layer] for layer in uniform(scores, config)] == scores


@given(st.floats(0, 1), st.integers(0, 10_000), st.integers(0, 50))
def test_kept_count(rate: float, tokens: int, min_kept: int) -> None:
    kept = kept_count(rate, tokens, min_kept)
    assert min(tokens, min_kept) <= kept <= tokens
    assert kept_count(1.0, tokens, min_kept) == tokens
    assert kept_count(0.0, tokens, min_kept) == min(tokens, min_kept)
    if min_kept < kept < tokens:
        assert abs(kept - Fraction(rate) * tokens) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert kept_count(min(1.0, rate + 0.1), tokens, min_kept) >= kept


def test_kept_count_rounds_halves_up() -> None:
    assert [kept_count(0.5, tokens, 0) for tokens in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert [kept_count(rate, 10, 0) for rate in (0.04, 0.05, 0.14, 0.15)] == [0, 1, 1, 2]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(0, 1))
def test_proportional_rates_have_the_mean_and_are_in_proportion_below_one(weights: list[float], mean: float) -> None:
    rates = allocation.proportional(weights, mean)
    assert sum(rates) / len(rates) == pytest.approx(mean, abs=1e-9)
    assert all(0 <= rate <= 1 for rate in rates)
    below = [(rate, weight) for rate, weight in zip(rates, weights, strict=True) if 1e-9 < rate < 1 - 1e-9]
    for (a, x), (b, y) in itertools.pairwise(below):
        if x > 1e-9 and y > 1e-9:
            assert a * y == pytest.approx(b * x, rel=1e-6)
    for (a, x), (b, y) in itertools.permutations(zip(rates, weights, strict=True), 2):
        if x > y:
            assert a >= b - 1e-9


def test_what_is_cut_at_one_goes_to_the_others() -> None:
    assert allocation.proportional([1, 1, 8], 0.5) == pytest.approx([0.25, 0.25, 1.0])
    assert allocation.proportional([0, 0, 1], 0.5) == pytest.approx([0.25, 0.25, 1.0])
    assert allocation.proportional([3, 2, 0], 1.0) == [1.0, 1.0, 1.0]
