# SPDX-License-Identifier: Apache-2.0
"""G-Search (arXiv:2412.00556): vision tokens leave the prompt along a schedule that was searched for on other prompts.

``schedule`` says before which layers tokens leave, and which share of them goes on: "2:.7,4:.5" keeps 70 % from layer 2
on (counted from 0) and 50 % from layer 4 on. The tokens are ranked anew before each of these layers, by the attention
that the last prompt token gives them in the layer before, averaged over all heads. A schedule is written by hand, or
found by ``plphp calibrate`` (`plphp.studies.schedule_search`), which goes through the layers from the first to the
last and keeps, from each layer on, the least share that leaves the model's answers as they are.

Default: no schedule; a search goes through shares in steps of 0.05 and holds the KL divergence of the next-token
distribution from that of the full model, mean over the answers' tokens, within ``tolerance`` = 0.05 nats. Simplified:
the paper keeps a score on a data set as it is, which needs right answers; here the full model's own answers are the
measure. And the paper looks at every layer, where the search here takes ``groups`` = 16 groups of layers of equal
length, those of a model with fewer layers one by one: tokens leave before the first layer of a group alone, so that a
search reads each prompt at most 5 times a group, however deep the model is. The paper's assumption, that the tokens
that are needed do not grow in number from layer to layer, is what lets a greedy search do; it holds by definition, as
what has left stays away. Positions stay as they were. Ours: ``evidence=bank`` ranks by the query bank ``bank`` instead,
see `plphp.methods._prefill`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise

from plphp.errors import ConfigError
from plphp.policy.method import Method
from plphp.policy.stages import PrefillStage
from plphp.settings.config import DEFAULT_RATE, PLPHPConfig
from plphp.settings.options import Option, settings

from . import _prefill

OPTIONS = {"schedule": Option("", sets_rate=True), "tolerance": Option(0.05, low=0), "groups": Option(16, low=1)}
OPTIONS |= _prefill.OPTIONS
FORM = 'layers with the shares that go on there, as in schedule="2:.7,4:.5"'


def read_schedule(text: str) -> dict[int, float]:
    """Read the layers of a schedule with their shares.

    Raises
    ------
    ConfigError
        If the text is no schedule, or its layers do not rise, or its shares do rise.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        steps = [(int(layer), float(share)) for layer, share in pairs]
    except ValueError:
        raise ConfigError(f"schedule must be {FORM}, got {text!r}.") from None
    for layer, share in steps:
        if layer < 1 or not 0 <= share <= 1:
            raise ConfigError(
                f"schedule must name layers from 1 on, with shares from 0 to 1, got {layer}:{share:g} in {text!r}."
            )
    if any(later <= earlier for (earlier, _), (later, _) in pairwise(steps)):
        raise ConfigError(f"schedule must name each layer once, in the order of the layers, got {text!r}.")
    if any(later > earlier for (_, earlier), (_, later) in pairwise(steps)):
        raise ConfigError(f"schedule lets tokens come back that have left, where its shares rise: {text!r}.")
    return dict(steps)


def with_schedule(config: PLPHPConfig, schedule: Mapping[int, float]) -> PLPHPConfig:
    """The settings with a schedule in the place of theirs, if they have any."""
    text = ",".join(f"{layer}:{share:g}" for layer, share in sorted(schedule.items()))
    return dataclasses.replace(config, options={**config.options, "schedule": text})


def rates(config: PLPHPConfig, layers: int) -> dict[int, float]:
    """The layers of the schedule at which tokens leave, with what goes on there."""
    return _prefill.falling(read_schedule(settings(OPTIONS, config.options)["schedule"]))


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse a missing schedule, one that does not fit the model, and a rate beside it."""
    _prefill.check(config, layers)
    schedule = settings(OPTIONS, config.options)["schedule"]
    if not schedule:
        raise ConfigError(
            f"g_search needs {FORM}: write one, or let `plphp calibrate --method g_search` search for it and write a "
            "preset."
        )
    last = max(read_schedule(schedule))
    if last >= layers:
        raise ConfigError(f"schedule must name layers below the number of decoder layers, {layers}, got {last}.")
    if config.base_rate != DEFAULT_RATE:
        raise ConfigError(
            f"g_search's schedule says how much stays, and so does the rate {config.base_rate:g}: leave it out."
        )


METHOD = Method(
    name="g_search",
    summary="inside prefill: vision tokens leave along a schedule that was searched for on other prompts",
    paper="arXiv:2412.00556",
    prefill=PrefillStage(rates, _prefill.kept_tokens, _prefill.evidence),
    options=OPTIONS,
    check=check,
    with_schedule=with_schedule,
    when="to shorten prefill by as much as your own prompts allow",
)
