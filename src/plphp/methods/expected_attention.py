# SPDX-License-Identifier: Apache-2.0
"""Rank by the attention that answers are *expected* to give, beside what the question looks at.

The last prompt token ranks what the answer says first. What a whole answer will look at cannot be seen from the prompt,
but the queries of answers have a distribution: its mean and covariance, per layer and query head, are collected once
from the model's own answers to other prompts (``plphp collect``), and give an expected attention E[j] for every vision
token (after arXiv:2510.00636, which takes the statistics from the prompt itself; see
`plphp.answer_queries.expected_attention`).
With P[j] the largest attention that any row of the text after the last image gives, per KV head:

    order by min(place of j by E, w * place of j by P)      ties by E

so with ``peak`` w = 2 two of three places go to what answers like to look at in general, and one to what this question
names. ``peak=0`` leaves out P. ``random_share`` of each head's places is drawn at random from what the ranking leaves.
"""

import torch
from torch import Tensor

from ..allocation import uniform
from ..answer_queries import statistics_at
from ..config import PLPHPConfig
from ..errors import ConfigError
from ..kernels.scores import places
from ..options import Option, settings
from ..selection import Mix, by_peak
from ..types import Evidence, LayerScores
from .base import Method

OPTIONS = {
    "statistics": Option(""),
    "peak": Option(2.0, low=0),
    "random_share": Option(0.0, low=0, high=1),
}

TIE = 2.0**-32
"""Weight of what settles ties between places, in float64."""


def evidence(config: PLPHPConfig) -> Evidence:
    """The expected attention, and the peaks if they are to count."""
    chosen = settings(OPTIONS, config.options)
    return Evidence(rows="text", peak=chosen["peak"] > 0, expected=chosen["statistics"])


def rank(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """By the better of the two places; negative, as higher is better."""
    expected = places(scores.need("expected"), scores.vision)
    weight = settings(OPTIONS, config.options)["peak"]
    best = expected.double()
    if weight:
        best = torch.minimum(best, weight * places(by_peak(scores, config), scores.vision))
    # Too small to reach the next place of either, whatever the weight: it settles ties and no more.
    return -(best + expected * TIE)


def check(config: PLPHPConfig, layers: int) -> None:
    """There are statistics, of a model of this depth."""
    path = settings(OPTIONS, config.options)["statistics"]
    if not path:
        raise ConfigError(
            "The method 'expected_attention' needs statistics of the model's answers: collect them with `plphp "
            "collect` and give their file, as in 'expected_attention:statistics=answers.safetensors'."
        )
    found = statistics_at(path).decoder_layers
    if found != layers:
        raise ConfigError(
            f"The statistics {path} are of a model with {found} decoder layers, and this one has {layers}: collect "
            "them with this model."
        )


METHOD = Method(
    name="expected_attention",
    summary="every KV head keeps what the model's answers are expected to look at",
    paper="control: own, after arXiv:2510.00636",
    allocate=uniform,
    rank=rank,
    options=OPTIONS,
    evidence=evidence,
    mix=lambda config: Mix(random=settings(OPTIONS, config.options)["random_share"]),
    check=check,
)
