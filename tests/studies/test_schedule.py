# SPDX-License-Identifier: Apache-2.0
"""What an estimate takes to leave early is what leaves early in a run."""

from __future__ import annotations

import pytest
import torch

from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.errors import ConfigError
from plphp.studies.accelerators import Accelerator
from plphp.studies.estimate import Workload, estimate
from plphp.studies.model_cost import LayerCost, ModelCost, model_cost
from plphp.studies.schedule import Schedule
from tiny_models import TINY, tiny_model

GPU = Accelerator("ours", memory=10**9, bandwidth=1e3, flops=1e6)
COST = ModelCost(100, 60, False, (LayerCost(2, None, 0, True, token_flops=7, pair_flops=3),) * 2, head_flops=11)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ("uniform:retention_rate=0.4", {}),
        ("encoder_random:retention_rate=0.5+uniform:retention_rate=0.4", {"encoder": 0.5}),
        # the mean over three layers, of which one is whole: 0.3 in the others
        ("fastv:layer=1,retention_rate=0.53333333333+uniform:retention_rate=0.4", {"prefill": "1:0.3"}),
        ("vtw:retention_rate=0.6+uniform:retention_rate=0.4", {"prefill": "2:0"}),
        (
            "encoder_random:retention_rate=0.5+fastv:layer=1,retention_rate=0.53333333333+uniform:retention_rate=0.4",
            {"encoder": 0.5, "prefill": "1:0.3"},
        ),
    ],
)
def test_tokens_and_bytes_are_those_of_a_run(settings: str, schedule: dict[str, object], images: int) -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [images])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(settings))
    vision = int(cache.reading.spans.vision.sum())
    with torch.no_grad():
        model(**inputs, **passed(cache))
    report, cost = cache.report(), model_cost(model)
    [prompt] = report.prompts
    prefill = schedule.get("prefill")
    workload = Workload(vision, cache.get_seq_length() - vision, 1)
    figures = estimate(
        cost, workload, 0.4, schedule=Schedule.parse(prefill, schedule.get("encoder", 1.0), images), accelerator=GPU
    )
    tokens = len(cost.layers) * cache.get_seq_length()
    assert figures.computed == (sum(prompt.computed) or tokens)
    if prompt.computed:
        assert figures.computed / tokens == prompt.computed_share
    entry = sum(layer.entry_bytes for layer in cost.layers)
    assert figures.sequence_kv_bytes == report.entry_bytes + entry  # and the new token


def test_a_first_token() -> None:
    figures = estimate(COST, Workload(6, 2, 1), schedule=Schedule(0.5, {1: 1 / 3}), accelerator=GPU, tower_flops=1000)
    first, second = 5 * 7 + 15 * 3, 3 * 7 + 6 * 3
    assert (figures.computed, figures.prefill_flops) == (8, first + second + 11)
    assert figures.first_token_seconds == 0.06  # the weights at a kilobyte a second take longer
    faster = Accelerator("ours", memory=10**9, bandwidth=1e12, flops=1e6)
    figures = estimate(COST, Workload(6, 2, 1), schedule=Schedule(0.5, {1: 1 / 3}), accelerator=faster, tower_flops=900)
    assert figures.first_token_seconds == (first + second + 11 + 900) / 1e6
    assert (figures.encoder_retention, figures.prefill, figures.tower_flops) == (0.5, "1:0.333333", 900)
    unknown = estimate(COST, Workload(6, 2, 1), accelerator=Accelerator("ours", 10**9, 1e3))
    assert (unknown.first_token_seconds, unknown.tower_flops) == (None, None)
    assert estimate(COST, Workload(6, 2, 1)).prefill_flops == 2 * (8 * 7 + 36 * 3) + 11


def test_a_first_token_with_attention_among_some_tokens() -> None:
    layers = (
        LayerCost(2, None, 0, True, token_flops=7, pair_flops=4),
        LayerCost(2, 9, 0, False, token_flops=7, pair_flops=4),
    )
    cost, faster = ModelCost(100, 60, False, layers, head_flops=11), Accelerator("ours", 10**9, 1e12, 1e6)
    figures = estimate(cost, Workload(6, 2, 1), 0.5, schedule=Schedule(attention=0.5), accelerator=faster)
    # The first layer attends among 3 + 2 tokens, and asks all 8 of them which; the second, with a window, among all.
    of_layers = (8 * 7 + 15 * 4 + 8 * 8 * 2) + (8 * 7 + 36 * 4)
    assert (figures.prefill_flops, figures.computed) == (of_layers + 11, 16)
    assert figures.first_token_seconds == (of_layers + 11) / 1e6
    assert figures.attention_retention == 0.5
    long = Workload(7000, 100, 1)
    few, all_ = (estimate(cost, long, schedule=Schedule(attention=share)).prefill_flops for share in (0.25, 1.0))
    assert few < 0.7 * all_


def test_the_text_of_a_schedule() -> None:
    assert Schedule.parse(None) == Schedule()
    assert Schedule.parse("16:0.25, 2:.5").prefill == {2: 0.5, 16: 0.25}
    assert Schedule.parse("16:0.25,2:0.5").text == "2:0.5,16:0.25"
    assert Schedule(0.5, {1: 0.5, 3: 0.0}, images=2).vision_tokens(11, 4) == [6, 3, 3, 0]
    assert Schedule(0.0, images=2).vision_tokens(11, 2) == [2, 2]
    assert Schedule(0.5).vision_tokens(0, 2) == [0, 0]


@pytest.mark.parametrize(
    ("text", "encoder", "message"),
    [
        ("2", 1.0, "such as 2:0.5 or"),
        ("", 1.0, "such as 2:0.5 or"),
        ("a:0.5", 1.0, "such as 2:0.5 or"),
        ("2:0.5,2:0.4", 1.0, "each layer once"),
        ("2:1.5", 1.0, r"between 0 and 1, got 1\.5"),
        ("2:nan", 1.0, "between 0 and 1, got nan"),
        ("2:0.5,4:0.6", 1.0, "does not come back"),
        ("0:0.5", 1.0, "before layer 1 at the earliest"),
        (None, 1.1, r"between 0 and 1, got 1\.1"),
    ],
)
def test_what_is_no_schedule(text: str | None, encoder: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule.parse(text, encoder)


def test_what_is_no_share_of_attention() -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 1, got 1\.5"):
        Schedule(attention=1.5)


def test_a_layer_that_the_model_has_not() -> None:
    with pytest.raises(ConfigError, match=r"the layers 0 to 1, and '2:0.5' names others"):
        estimate(COST, Workload(6, 2, 1), schedule=Schedule.parse("2:0.5"))
