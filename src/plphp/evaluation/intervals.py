# SPDX-License-Identifier: Apache-2.0
"""Means with 95 % intervals by the paired bootstrap: all variants are judged on the same resampled samples."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22
"""Counts that are alive at a time while resampling."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return mean and bounds, rounded to what the resampling resolves."""
        return {"mean": round(self.mean, 5), "low": round(self.low, 5), "high": round(self.high, 5)}


@dataclass(frozen=True)
class Resampled:
    """Means of several variants over one set of samples, or over several sets with equal weight.

    Parameters
    ----------
    means : ndarray
        float64 [variants].
    draws : ndarray
        float64 [resamples, variants]; the same resampled samples for all variants.
    """

    means: Array
    draws: Array

    def interval(self, variant: int, minus: int | None = None) -> Interval:
        """Mean of a variant, or of its difference from another, with the percentile interval."""
        mean, draws = self.means[variant], self.draws[:, variant]
        if minus is not None:
            mean, draws = mean - self.means[minus], draws - self.draws[:, minus]
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Interval(float(mean), float(low), float(high))


def resample(scores: Any, name: str = "", *, seed: int = 0, resamples: int = RESAMPLES) -> Resampled:
    """Draw samples with replacement, for all variants alike.

    Parameters
    ----------
    scores : array_like
        [samples, variants]; scores in [0, 1].
    name : str
        Of the set: other sets get other draws from the same seed.
    seed : int
        Of the draws.
    resamples : int
        How many.

    Raises
    ------
    ConfigError
        If there are no samples.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ConfigError(f"Scores must be [samples, variants] with at least one sample, got shape {values.shape}.")
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    samples = len(values)
    step = max(1, CHUNK // samples)
    parts = []
    for start in range(0, resamples, step):
        counts = generator.multinomial(samples, np.full(samples, 1 / samples), size=min(step, resamples - start))
        parts.append(counts.astype(np.float64) @ values / samples)
    return Resampled(values.mean(0), np.concatenate(parts))


def averaged(sets: Sequence[Resampled]) -> Resampled:
    """Average over sets with equal weight, each resampled by itself."""
    return Resampled(np.mean([one.means for one in sets], axis=0), np.mean([one.draws for one in sets], axis=0))
