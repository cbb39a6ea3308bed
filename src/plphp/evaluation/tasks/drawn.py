# SPDX-License-Identifier: Apache-2.0
"""What tasks of drawn images have in common: samples from a split, a number and a seed."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial

from .choices import SPLITS, Split, check_choice
from .metrics import get_metric
from .task import Maker, Sample

SCALE = 4
"""Images are drawn at 448 x 448 pixels; the processor brings them to the model's size."""


class DrawnTask(ABC):
    """A task whose samples are drawn, with the attributes of `plphp.evaluation.tasks.task.AnyTask`."""

    name: str
    group: str
    summary: str
    chance: float
    metric: str
    scored: bool

    def samples(self, split: Split, count: int, seed: int = 0) -> Iterator[Sample]:
        """Draw the first ``count`` samples of a split; the same seed always gives the same ones.

        Parameters
        ----------
        split : {"dev", "test"}
            Each has handwritten digits, fonts and layouts that training did not show, and its own seeds.
        count : int
            How many.
        seed : int
            Seed of the samples.

        Raises
        ------
        ConfigError
            If there is no such split.
        """
        return (make() for make in self.sample_makers(split, count, seed))

    def sample_makers(self, split: Split, count: int, seed: int = 0) -> list[Maker]:
        """Makers of the same samples; none is drawn before it is asked for.

        Raises
        ------
        ConfigError
            If there is no such split.
        """
        check_choice("split", split, SPLITS)
        return [partial(self._sample, split, number, seed) for number in range(count)]

    def chance_of(self, split: Split, number: int, seed: int) -> random.Random:
        """A source of chance of its own, so that a sample does not depend on which others are drawn."""
        return random.Random(f"{split}-{self.name}-{seed}-{number}")

    @property
    def verifiable(self) -> bool:
        """Whether one pass over a reference answer can say if greedy decoding would give it."""
        return get_metric(self.metric).verifiable

    @abstractmethod
    def _sample(self, split: Split, number: int, seed: int) -> Sample:
        """Draw a sample."""
