# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap against known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plphp.errors import ConfigError
from plphp.evaluation.results.intervals import averaged, resample


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    scores = np.zeros((400, 1))
    scores[:100] = 1
    interval = resample(scores).interval(0)
    spread = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert interval.mean == 0.25
    assert interval.low == pytest.approx(0.25 - spread, abs=0.006)
    assert interval.high == pytest.approx(0.25 + spread, abs=0.006)


def test_differences_are_paired() -> None:
    """Two variants that differ on every tenth sample, far less than two independent ones would."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 2, 500).astype(float)
    second = first.copy()
    second[::10] = 0
    resampled = resample(np.stack([first, second], 1))
    difference = resampled.interval(1, minus=0)
    assert difference.mean == pytest.approx(second.mean() - first.mean())
    alone = resampled.interval(0)
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)
    assert difference.high < 0


def test_the_seed_and_the_name_say_the_draws() -> None:
    scores = np.random.default_rng(1).random((50, 2))
    first = resample(scores, "a", seed=1, resamples=500).draws
    assert np.array_equal(first, resample(scores, "a", seed=1, resamples=500).draws)
    assert not np.array_equal(first, resample(scores, "b", seed=1, resamples=500).draws)
    assert not np.array_equal(first, resample(scores, "a", seed=2, resamples=500).draws)


def test_chunks_make_no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plphp.evaluation.results.intervals.CHUNK", 70)
    assert resample(np.ones((10, 1)), resamples=1001).draws.shape == (1001, 1)


def test_a_group_weighs_its_tasks_equally() -> None:
    long, short = np.zeros((900, 1)), np.ones((100, 1))
    interval = averaged([resample(long, "a"), resample(short, "b")]).interval(0)
    assert interval.mean == 0.5
    spread = (1 - wilson(100, 100)[0]) / 2
    assert interval.low == pytest.approx(0.5 - spread, abs=1e-12)
    assert interval.high == pytest.approx(0.5 + wilson(0, 900)[1] / 2, abs=1e-12)


def wilson(right: int, samples: int) -> tuple[float, float]:
    """Bounds by hand: E. B. Wilson, 1927."""
    z, share = 1.959963984540054, right / samples
    middle = (share + z**2 / (2 * samples)) / (1 + z**2 / samples)
    half = z / (1 + z**2 / samples) * math.sqrt(share * (1 - share) / samples + z**2 / (4 * samples**2))
    return middle - half, middle + half


@pytest.mark.parametrize(("right", "samples"), [(10, 10), (0, 10), (1, 1), (500, 500)])
def test_the_interval_of_all_or_none_is_wilsons(right: int, samples: int) -> None:
    interval = resample(np.full((samples, 1), right / samples)).interval(0)
    low, high = wilson(right, samples)
    assert interval.mean == right / samples
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert interval.high - interval.low > 0


def test_a_difference_that_never_shows_may_still_be_there() -> None:
    scores = np.zeros((10, 3))
    scores[:7, :2] = 1
    resampled = resample(scores)
    may_differ = wilson(0, 10)[1]
    same = resampled.interval(1, minus=0)
    assert (same.mean, same.low, same.high) == (0, pytest.approx(-may_differ), pytest.approx(may_differ))
    assert resampled.interval(0, minus=0).to_dict() == {"mean": 0, "low": 0, "high": 0}
    always = resample(np.array([[1.0, 0.0]] * 10)).interval(1, minus=0)
    assert (always.mean, always.low, always.high) == (-1, -1, pytest.approx(-1 + 2 * may_differ))


def test_other_values_that_never_change_have_an_interval_too() -> None:
    interval = resample(np.full((20, 1), 0.4)).interval(0)
    share = wilson(0, 20)[1]
    assert (interval.low, interval.high) == (pytest.approx(0.4 - 0.4 * share), pytest.approx(0.4 + 0.6 * share))


def test_a_set_without_spread_widens_the_interval_of_its_group() -> None:
    mixed = np.random.default_rng(0).integers(0, 2, (200, 1)).astype(float)
    constant = resample(np.ones((5, 1)), "b")
    group, alone = averaged([resample(mixed, "a"), constant]).interval(0), resample(mixed, "a").interval(0)
    assert group.high - group.mean == pytest.approx((alone.high - alone.mean) / 2, abs=1e-6)
    unseen, bootstrap = (1 - wilson(5, 5)[0]) / 2, (alone.mean - alone.low) / 2
    assert group.mean - group.low == pytest.approx(math.hypot(unseen, bootstrap), abs=1e-6)


def test_averages_of_averages_weigh_their_parts() -> None:
    sets = [resample(np.full((9, 1), value), name) for name, value in (("a", 1.0), ("b", 0.0), ("c", 0.0))]
    pooled = averaged([averaged(sets[:2]), sets[2]])
    assert pooled.means.tolist() == [0.25]
    assert [weight for weight, _ in pooled.sets] == [0.25, 0.25, 0.5]


def test_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        resample(np.zeros((0, 2)))
