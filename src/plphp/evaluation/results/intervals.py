# SPDX-License-Identifier: Apache-2.0
"""Means with 95 % intervals by the paired bootstrap: all variants are judged on the same resampled samples.

The bootstrap only draws what was seen. Where all n samples of a set have the same value v, every draw has it too, and
the interval would have no width, as if nothing else could happen. There it is widened by Wilson's score interval: at
most the share u of all samples, its upper bound for 0 of n, has another value than v, and no value lies outside of
[low, high]. For scores of 0 and 1 this is Wilson's interval itself: 10 right of 10 are 100 % (72.2 to 100).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from plphp.errors import ConfigError

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22
"""Counts that are alive at a time while resampling (32 MiB in float64)."""

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
    """Means of several variants over a set of samples, or a weighted mean over several sets.

    Parameters
    ----------
    means : ndarray
        float64 [variants].
    draws : ndarray
        float64 [resamples, variants]; the same resampled samples for all variants.
    sets : tuple
        The scores of each set, float64 [samples, variants], with the weight of the set in the mean.
    """

    means: Array
    draws: Array
    sets: tuple[tuple[float, Array], ...]

    def interval(self, variant: int, minus: int | None = None) -> Interval:
        """Mean of a variant, or of its difference from another, with its 95 % interval.

        It is the percentile interval of the bootstrap, to which what the bootstrap cannot see in sets without any
        spread is added in quadrature (the sets are independent).
        """
        mean, draws = self.means[variant], self.draws[:, variant]
        if minus is not None:
            mean, draws = mean - self.means[minus], draws - self.draws[:, minus]
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(draws, [tail, 1 - tail])
        below, above = self._unseen(variant, minus)
        # Without such a set the bootstrap's bounds are left as they are, to the last bit.
        return Interval(
            float(mean),
            float(mean - math.hypot(mean - low, *below) if any(below) else low),
            float(mean + math.hypot(high - mean, *above) if any(above) else high),
        )

    def _unseen(self, variant: int, minus: int | None) -> tuple[list[float], list[float]]:
        """For each set without spread, how far below and above the mean the truth may be."""
        below, above = [], []
        least = 0.0 if minus is None else -1.0
        for weight, scores in self.sets:
            values = scores[:, variant] if minus is None else scores[:, variant] - scores[:, minus]
            if variant != minus and np.ptp(values) == 0:
                share = unseen_share(len(values))
                below.append(weight * share * (values[0] - least))
                above.append(weight * share * (1 - values[0]))
        return below, above


def unseen_share(samples: int) -> float:
    """Upper bound of Wilson's 95 % interval for the share of something that no sample of so many showed."""
    from scipy.stats import binomtest  # type: ignore[import-untyped, unused-ignore]  # half a second, and seldom needed

    return float(binomtest(0, samples).proportion_ci(LEVEL, method="wilson").high)


def resample(scores: Any, name: str = "", *, seed: int = 0, resamples: int = RESAMPLES) -> Resampled:
    """Draw samples with replacement, for all variants alike.

    Parameters
    ----------
    scores : array_like
        [samples, variants]; scores in [0, 1].
    name : str
        Name of the set: sets of different names get different draws from the same seed.
    seed : int
        Seed of the draws.
    resamples : int
        Number of draws.

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
    return Resampled(values.mean(0), np.concatenate(parts), ((1.0, values),))


def averaged(parts: Sequence[Resampled]) -> Resampled:
    """Average with equal weight over parts that are each resampled by themselves."""
    return Resampled(
        np.mean([part.means for part in parts], axis=0),
        np.mean([part.draws for part in parts], axis=0),
        tuple((weight / len(parts), values) for part in parts for weight, values in part.sets),
    )
