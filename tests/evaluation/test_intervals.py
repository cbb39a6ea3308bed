# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap against known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plphp.errors import ConfigError
from plphp.evaluation.intervals import averaged, resample


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    scores = np.zeros((400, 1))
    scores[:100] = 1
    found = resample(scores).interval(0)
    spread = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert found.mean == 0.25
    assert found.low == pytest.approx(0.25 - spread, abs=0.006)
    assert found.high == pytest.approx(0.25 + spread, abs=0.006)


def test_differences_are_paired() -> None:
    """Two variants that differ on every tenth sample, far less than two independent ones would."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 2, 500).astype(float)
    second = first.copy()
    second[::10] = 0
    found = resample(np.stack([first, second], 1))
    difference = found.interval(1, minus=0)
    assert difference.mean == pytest.approx(second.mean() - first.mean())
    alone = found.interval(0)
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)
    assert difference.high < 0
    assert found.interval(0, minus=0).to_dict() == {"mean": 0, "low": 0, "high": 0}


def test_the_seed_and_the_name_say_the_draws() -> None:
    scores = np.random.default_rng(1).random((50, 2))
    first = resample(scores, "a", seed=1, resamples=500).draws
    assert np.array_equal(first, resample(scores, "a", seed=1, resamples=500).draws)
    assert not np.array_equal(first, resample(scores, "b", seed=1, resamples=500).draws)
    assert not np.array_equal(first, resample(scores, "a", seed=2, resamples=500).draws)


def test_chunks_make_no_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plphp.evaluation.intervals.CHUNK", 70)
    assert resample(np.ones((10, 1)), resamples=1001).draws.shape == (1001, 1)


def test_a_group_weighs_its_tasks_equally() -> None:
    long, short = np.zeros((900, 1)), np.ones((100, 1))
    found = averaged([resample(long, "a"), resample(short, "b")]).interval(0)
    assert found.to_dict() == {"mean": 0.5, "low": 0.5, "high": 0.5}


def test_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        resample(np.zeros((0, 2)))
