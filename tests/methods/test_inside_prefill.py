# SPDX-License-Identifier: Apache-2.0
"""Methods of the prefill stage: which tokens stay, by hand-made scores, and the schedules of their rates."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from invariants import pruned
from plphp import ConfigError, PLPHPConfig, PrunedCache
from plphp.extend import LayerScores
from plphp.methods import g_search, p_sigmoid, pyramiddrop
from plphp.methods.registry import chain_of, get_method
from tiny_models import TINY, tiny_model

RANKED = ("fastv", "pyramiddrop", "p_sigmoid", "g_search")


def scores(vision: list[float], **values: Any) -> LayerScores:
    """A row of four text tokens around the vision tokens, which two query heads give this mean attention."""
    mean = torch.tensor([0.0, 0.0, *vision, 0.0, 0.0])
    tilt = torch.linspace(-0.01, 0.01, len(mean))
    segment = torch.tensor([-1, -1, *([0] * len(vision)), -1, -1])
    attention = torch.stack([mean + tilt, mean - tilt])[None]
    return LayerScores(attention, segment[None], torch.ones(1, len(mean), dtype=torch.bool), 0, 2, **values)


def stay(line: str, of: LayerScores, rate: float) -> list[int]:
    """Numbers of the vision tokens that stay."""
    config = PLPHPConfig.parse(line)
    prefill = get_method(config.method).prefill
    assert prefill is not None
    mask = prefill.kept_tokens(of, [rate], config)[0]
    return mask[of.segment[0] >= 0].nonzero()[:, 0].tolist()


def rates(line: str, layers: int) -> dict[int, float]:
    config = PLPHPConfig.parse(line)
    prefill = get_method(config.method).prefill
    assert prefill is not None
    return dict(prefill.rates(config, layers))


def mean_over_layers(drops: dict[int, float], layers: int) -> float:
    share, total = 1.0, 0.0
    for layer in range(layers):
        share = drops.get(layer, share)
        total += share
    return total / layers


@pytest.mark.parametrize("method", RANKED)
def test_the_most_attended_stay(method: str) -> None:
    of = scores([0.1, 0.4, 0.2, 0.3, 0.05, 0.25])
    assert stay(method, of, 0.5) == [1, 3, 5]
    assert stay(method, of, 1 / 6) == [1]
    assert stay(method, of, 0.0) == [1]  # min_kept
    assert stay(f"{method}:min_kept=0", of, 0.0) == []
    assert stay(method, of, 1.0) == list(range(6))


@pytest.mark.parametrize("method", RANKED)
def test_a_bank_keeps_what_any_query_in_any_head_looks_at_first(method: str) -> None:
    # The first head looks at token 4, the second at token 0; the others go by their best position, then by the mean.
    best = torch.tensor([[5, 5, 3, 4, 5, 2, 0, 1, 5, 5], [5, 5, 0, 3, 1, 4, 5, 2, 5, 5]])[None]
    of = scores([0.1, 0.4, 0.2, 0.3, 0.05, 0.25], best_position=best)
    by_bank = f"{method}:evidence=bank,bank=bundled"
    assert [stay(by_bank, of, count / 6) for count in range(1, 5)] == [[0], [0, 4], [0, 4, 5], [0, 2, 4, 5]]


@pytest.mark.parametrize("method", RANKED)
def test_a_bank_is_asked_where_the_option_says_so(method: str) -> None:
    prefill = get_method(method).prefill
    assert prefill is not None
    assert prefill.evidence(PLPHPConfig(method=method)).bank is None
    by_bank = prefill.evidence(PLPHPConfig.parse(f"{method}:evidence=bank,bank=b.safetensors"))
    assert (by_bank.bank, by_bank.best_position) == ("b.safetensors", True)


def test_the_steps_of_the_paper() -> None:
    assert rates("pyramiddrop:factor=0.5", 32) == {8: 0.5, 16: 0.25, 24: 0.125}
    assert rates("pyramiddrop:factor=0.5,stages=2", 28) == {14: 0.5}
    assert rates("pyramiddrop:factor=0.5", 3) == {1: 0.5, 2: 0.25}
    assert rates("pyramiddrop:factor=0.25", 6) == {2: 0.25, 3: 0.0625, 5: 0.015625}
    by_rate = rates("pyramiddrop:retention_rate=0.46875", 32)
    assert by_rate == pytest.approx({8: 0.5, 16: 0.25, 24: 0.125}, abs=1e-9)


@pytest.mark.parametrize("layers", [3, 8, 26, 32, 61])
@pytest.mark.parametrize("rate", [0.4, 0.5, 0.7, 0.95])
@pytest.mark.parametrize(
    "line",
    ["pyramiddrop:", "pyramiddrop:stages=7,", "p_sigmoid:", "p_sigmoid:steepness=0.5,", "p_sigmoid:steepness=90,"],
)
def test_the_mean_over_the_layers_is_what_is_asked_for(line: str, rate: float, layers: int) -> None:
    drops = rates(f"{line}retention_rate={rate}", layers)
    assert mean_over_layers(drops, layers) == pytest.approx(rate, abs=1e-8)
    assert list(drops.values()) == sorted(drops.values(), reverse=True)
    assert all(0 < layer < layers for layer in drops)


def test_a_sigmoid_of_the_depth() -> None:
    drops = rates("p_sigmoid:retention_rate=0.5,steepness=8", 8)
    assert list(drops) == list(range(1, 8))
    logits = [math.log(rate / (1 - rate)) for rate in drops.values()]
    assert [later - earlier for earlier, later in pairwise(logits)] == pytest.approx([-1.0] * 6)
    late = rates("p_sigmoid:retention_rate=0.75,first=5", 8)
    assert list(late) == [5, 6, 7]
    assert mean_over_layers(late, 8) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("line", "layers", "expected"),
    [
        ("pyramiddrop:retention_rate=1.0", 8, {}),
        ("p_sigmoid:retention_rate=1.0", 8, {}),
        ("pyramiddrop:retention_rate=0.25", 8, {2: 0.0}),
        ("p_sigmoid:retention_rate=0.125", 8, {1: 0.0}),
        ("p_sigmoid:retention_rate=0.5,first=4", 8, {4: 0.0}),
    ],
)
def test_layers_at_which_nothing_leaves_are_left_out(line: str, layers: int, expected: dict[int, float]) -> None:
    assert rates(line, layers) == pytest.approx(expected, abs=1e-9)


def test_a_schedule_by_hand() -> None:
    assert rates('g_search:schedule="2:.7,4:.5"', 8) == {2: 0.7, 4: 0.5}
    assert rates('g_search:schedule="1:1,2:.7, 3:0.70,4:0"', 8) == {2: 0.7, 4: 0.0}
    config = g_search.with_schedule(PLPHPConfig.parse("g_search:tolerance=0.1,schedule=1:.1"), {4: 0.5, 2: 0.7})
    assert dict(config.options) == {"schedule": "2:0.7,4:0.5", "tolerance": 0.1}
    assert g_search.rates(config, 8) == {2: 0.7, 4: 0.5}
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [2])
    by_schedule, report = pruned(model, inputs, PLPHPConfig.parse('g_search:schedule="1:.5,2:.25"'))
    by_steps, _ = pruned(model, inputs, PLPHPConfig.parse("pyramiddrop:factor=.5"))
    assert all(torch.equal(mine, other) for mine, other in zip(by_schedule.logits, by_steps.logits, strict=True))
    assert [layer.rows[0].rate for layer in report.prompts[0].layers] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("module", [pyramiddrop, p_sigmoid], ids=["pyramiddrop", "p_sigmoid"])
def test_layers_get_what_the_rates_say(module: Any) -> None:
    model = tiny_model("llava")
    config = PLPHPConfig(method=module.METHOD.name, retention_rate=0.6)
    inputs = TINY["llava"].inputs(model, [2])
    _, report = pruned(model, inputs, config)
    drops = module.rates(config, 3)
    assert list(drops) == [1, 2]
    [prompt] = report.prompts
    assert [stage.layer for stage in prompt.stages] == [1, 2]
    vision = prompt.layers[0].rows[0].vision_tokens
    text = inputs["input_ids"].shape[1] - vision
    counts = [vision, *(max(1, math.floor(rate * vision + 0.5)) for rate in drops.values())]
    assert [sum(layer.rows[0].kept) for layer in prompt.layers] == [count * 2 for count in counts]
    assert prompt.computed == [text + count for count in counts]
    assert [layer.rows[0].rate for layer in prompt.layers] == pytest.approx([1.0, *drops.values()])


def test_a_layer_at_which_no_token_leaves_is_no_stage() -> None:
    """Few tokens have the same number of them at many rates."""
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    _, report = pruned(model, inputs, PLPHPConfig.parse("p_sigmoid:retention_rate=0.99"))
    stages = report.prompts[0].stages
    assert all(sum(stage.tokens_out) < sum(stage.tokens_in) for stage in stages)
    assert len(stages) < 2


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "p_sigmoid"])
def test_a_rate_below_that_of_the_layers_that_keep_all_is_refused(method: str) -> None:
    message = rf"{method} keeps everything in its first \d of 8 layers, so the least retention_rate is 0\."
    with pytest.raises(ConfigError, match=message):
        chain_of(PLPHPConfig.parse(f"{method}:retention_rate=0.1"), 8)


@pytest.mark.parametrize("method", RANKED)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("exempt_layers=0", r"{0} takes tokens out of all later layers, so none of them can be exempt"),
        ("head_safeguard=0.5", r"{0} takes tokens out of all heads: leave out head_safeguard, got 0.5"),
        ("bank=bundled", r"{0} asks with a query bank where its evidence is that: add evidence=bank, or leave out"),
        ("evidence=bank", r"{0}:evidence=bank needs queries of the model's answers: collect them with `plphp collect`"),
        ("evidence=bank,bank=bundled,query_rows=3", r"{0}:evidence=bank asks with the queries of its bank"),
        ("evidence=text", r"The option 'evidence' of the method '{0}' must be one of 'last_row', 'bank', got 'text'"),
    ],
)
def test_what_is_refused(method: str, settings: str, message: str) -> None:
    schedule = "schedule=2:.5," if method == "g_search" else ""
    with pytest.raises(ConfigError, match=message.format(method)):
        chain_of(PLPHPConfig.parse(f"{method}:{schedule}{settings}"), 8)


@pytest.mark.parametrize(
    "setting", ["query_rows=3", "gqa_reduction=max", "score_pool=3", "image_quota=per_image", "min_kept=5"]
)
def test_vtw_ranks_nothing(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"vtw lets all .* none are ranked: leave out {setting.split('=')[0]}, got"):
        chain_of(PLPHPConfig.parse(f"vtw:{setting}"), 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "pyramiddrop:factor=0.5,retention_rate=0.3",
            r"factor or a rate, not both: .*mean of 0\.4688 of these 8",
        ),
        ("pyramiddrop:factor=0.5,target_retention=0.3", "factor or a rate, not both"),
        ("pyramiddrop:factor=1.5", "must be a number from 0 to 1"),
        ("pyramiddrop:retention_rate=0.2", r"first 2 of 8 layers, .* is 0\.25, got 0\.2: .* or set its option stages"),
        ("g_search", r'g_search needs layers with .* as in schedule="2:\.7,4:\.5": write one, or let `plphp calibrate'),
        ("g_search:schedule=2:", r"schedule must be layers with the shares .*, got '2:'"),
        ("g_search:schedule=0.5:0.5", r"schedule must be layers with .*, got '0\.5:0\.5'"),
        ("g_search:schedule=2:nan", "shares from 0 to 1, got 2:nan"),
        ("g_search:schedule=0:0.5", "layers from 1 on, with shares from 0 to 1, got 0:0.5"),
        ("g_search:schedule=2:1.5", "layers from 1 on, with shares from 0 to 1, got 2:1.5"),
        ('g_search:schedule="4:.5,2:.5"', "each layer once, in the order of the layers"),
        ('g_search:schedule="2:.7,2:.5"', "each layer once, in the order of the layers"),
        ('g_search:schedule="2:.5,4:.7"', "lets tokens come back that have left"),
        ('g_search:schedule="2:.5,8:.1"', "layers below the number of decoder layers, 8, got 8"),
        ("g_search:schedule=2:.5,retention_rate=0.3", "says how much stays, and so does the rate 0.3"),
        ("p_sigmoid:first=8", "p_sigmoid's first must be below the number of decoder layers, 8, got 8"),
        ("p_sigmoid:first=4", r"first 4 of 8 layers, .* is 0\.5, got 0\.4: .* or set its option first lower"),
    ],
)
def test_what_a_schedule_refuses(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chain_of(PLPHPConfig.parse(line), 8)


def test_a_bank_of_another_depth_is_refused() -> None:
    model = tiny_model("llava")
    config = PLPHPConfig.parse("p_sigmoid:evidence=bank,bank=bundled")
    with pytest.raises(ConfigError, match="layers"):
        PrunedCache.for_inputs(model, TINY["llava"].inputs(model), config)
