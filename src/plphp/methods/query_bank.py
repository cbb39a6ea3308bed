# SPDX-License-Identifier: Apache-2.0
"""Ask the prompt with queries of other answers: each KV head keeps what any of them would look at. Our own; no paper.

The last prompt token ranks what the answer says *first*; the rest of an answer, or a later question, looks elsewhere.
The queries with which the model wrote answers to *other* prompts are kept once (``plphp collect``), per layer and query
head, without their rotary position. Turned to the places behind a new prompt, they stand for the answer that is not
there yet. With A the softmax attention of a KV head (query heads combined by ``gqa_reduction``) for the queries t of
the bank, and v_j the value of entry j:

    best[j] = min over t of the position of j in the order among the candidates by A[t, j], from 0
    s[j]    = 1 / (2 + best[j] - mean[j] / max(mean))        times ||v_j|| with ``value_norm=1``

as in `plphp.methods.recall_rank`, with the mean of A over the bank. The KV heads of a layer compete for its places by
s (``heads="ragged"``, unless the config says otherwise). ``candidates`` are the vision tokens, or with ``prompt`` all
tokens but the last; then as many entries leave as vision tokens would at the rate, and text may be among them.
``reduce`` may be the largest attention that any query gives (``peak``), or their ``mean``, instead. Under a
``vision_budget`` entries fade by ``peak`` unless it is named. ``random_share`` of each head's places is drawn at random
from what the ranking leaves. Related: arXiv:2510.00636 foretells the attention of later queries from the distribution
of the prompt's own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.allocation import uniform
from plphp.policy.evidence import Evidence, LayerScores, OwnBank
from plphp.policy.method import Method
from plphp.policy.rankers import by_peak, times_value_norm
from plphp.policy.selection import Mix
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from . import _best

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {
    "candidates": Option("vision", choices=("vision", "prompt")),
    "bank": Option(""),
    "collect": Option(16, low=1),
    "folder": Option(""),
    **_best.OPTIONS,
    "random_share": Option(0.0, low=0, high=1),
}

COLLECTING = ("collect", "folder")
"""Options of a bank that the engine collects."""


def evidence(config: PLPHPConfig) -> Evidence:
    """What the option ``reduce`` looks at, under the queries of the bank."""
    options, asked = settings(OPTIONS, config.options), _best.asked(config)
    return Evidence(
        candidates=options["candidates"],
        bank=options["bank"] or OwnBank(options["collect"], options["folder"]),
        **{**asked, "peak": asked["peak"] or config.vision_budget is not None},
    )


def fading_score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """By which entries fade: as by ``reduce``, or where none is named as by ``peak`` (docs/findings.md)."""
    if "reduce" in config.options:
        return _best.score(scores, config)
    return times_value_norm(by_peak(scores, config), scores)


def check(config: PLPHPConfig, layers: int) -> None:
    """Nothing else than a bank is to ask, and one that is named is of a model of this depth."""
    name = settings(OPTIONS, config.options)["bank"]
    if config.query_rows is not None:
        raise ConfigError(
            f"The method 'query_bank' asks with the queries of its bank, got query_rows={config.query_rows!r}: leave "
            "it out."
        )
    if not name:
        return
    collecting = [option for option in COLLECTING if config.options.get(option)]
    if collecting:
        raise ConfigError(
            f"The method 'query_bank' has the bank {name}, so that there is nothing to collect: leave out bank, or "
            f"{' and '.join(collecting)}."
        )
    from plphp.policy.bank import check_depth

    check_depth(name, layers)


def with_bank(config: PLPHPConfig, file: str) -> PLPHPConfig:
    """The settings with the bank of a file in the place of what is to be collected."""
    kept = {name: value for name, value in config.options.items() if name not in COLLECTING}
    return dataclasses.replace(config, options={**kept, "bank": file})


METHOD = Method(
    name="query_bank",
    summary="every KV head keeps what the queries of other answers would look at",
    paper="own: queries of other answers, heads as in arXiv:2407.11550",
    kv=KVStage(
        allocate=uniform,
        score=_best.score,
        evidence=evidence,
        mix=lambda config: Mix(random=settings(OPTIONS, config.options)["random_share"]),
        heads="ragged",
        fading_score=fading_score,
    ),
    options=OPTIONS,
    check=check,
    with_bank=with_bank,
    when="first of all: of all methods measured it loses least, at every rate",
)
