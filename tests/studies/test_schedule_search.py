# SPDX-License-Identifier: Apache-2.0
"""A searched schedule keeps the answers within its tolerance, and no less could be kept at any of its layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plphp
from invariants import generate, pruned
from plphp import ConfigError, PLPHPConfig
from plphp.methods.g_search import read_schedule
from plphp.studies import schedule_search
from plphp.studies.schedule_search import search_schedule
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")


def prompts_of(family: str) -> list[dict[str, Any]]:
    return [TINY[family].inputs(tiny_model(family), [images], seed=seed) for seed, images in enumerate((1, 2, 2))]


def divergence(family: str, schedule: str) -> float:
    """By the logits of ``generate``: the mean KL divergence over the tokens of the full model's greedy answers."""
    model, found = tiny_model(family), []
    for inputs in prompts_of(family):
        expected = generate(model, inputs, max_new_tokens=schedule_search.ANSWER)
        answer = expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        forced = {
            "prefix_allowed_tokens_fn": lambda batch, ids, answer=answer, n=inputs["input_ids"].shape[1]: [
                answer[len(ids) - n]
            ]
        }
        output, _ = pruned(
            model,
            inputs,
            PLPHPConfig(method="g_search", options={"schedule": schedule}),
            max_new_tokens=schedule_search.ANSWER,
            output_logits=True,
            **forced,
        )
        for full, mine in zip(expected.logits, output.logits, strict=True):
            of_full, of_mine = full[0].log_softmax(-1), mine[0].log_softmax(-1)
            found.append(float((of_full.exp() * (of_full - of_mine)).sum()))
    return sum(found) / len(found)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_a_schedule_is_the_least_within_the_tolerance(family: str) -> None:
    layers = tiny_model(family).config.get_text_config().num_hidden_layers
    first = 2 if family == "gemma3" else 1
    tolerance = 0.6 * divergence(family, f"{first}:0.05")
    line = f"g_search:tolerance={tolerance},seed=3"
    config = search_schedule(tiny_model(family), prompts_of(family), PLPHPConfig.parse(line))
    assert (config.method, config.seed, config.calibrated_layers, config.target_retention) == (
        "g_search",
        3,
        layers,
        None,
    )
    schedule = read_schedule(config.options["schedule"])
    assert min(schedule) >= first
    done = ""
    for layer, share in schedule.items():
        allowed = tolerance * (layer - first + 1) / (layers - first)
        assert divergence(family, f"{done}{layer}:{share}") <= allowed + 1e-6
        if share > 0:
            assert divergence(family, f"{done}{layer}:{share - 0.05:g}") > allowed - 1e-6
        done += f"{layer}:{share},"


@pytest.mark.parametrize(
    ("line", "first", "layers", "expected"),
    [
        ("g_search", 1, 17, list(range(1, 17))),
        ("g_search", 2, 17, list(range(2, 17))),
        ("g_search", 1, 33, list(range(1, 33, 2))),
        ("g_search:groups=3", 1, 8, [1, 3, 5]),
        ("g_search:groups=1", 1, 80, [1]),
        ("g_search:groups=99", 1, 80, list(range(1, 80))),
        ("g_search", 1, 1, []),
    ],
)
def test_a_search_looks_at_the_first_layers_of_groups(line: str, first: int, layers: int, expected: list[int]) -> None:
    config = PLPHPConfig.parse(line)
    assert schedule_search.searched_layers(config, first, layers) == expected
    if first == 1:
        assert schedule_search.most_readings(config, layers) == 1 + 5 * len(expected)


@given(st.integers(1, 60), st.integers(1, 90))
def test_groups_are_of_equal_length(groups: int, layers: int) -> None:
    begins = schedule_search.searched_layers(PLPHPConfig(method="g_search", options={"groups": groups}), 1, layers + 1)
    lengths = [later - earlier for earlier, later in pairwise([*begins, layers + 1])]
    assert len(lengths) == min(groups, layers)
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("groups", [1, 2])
def test_a_search_in_groups_reads_as_often_as_it_says(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, read = tiny_model("llava"), prompts_of("llava"), []
    divergence_of = schedule_search._divergence

    def counting(model: Any, answers: Any, config: PLPHPConfig) -> float:
        read.append(read_schedule(str(config.options["schedule"])))
        return divergence_of(model, answers, config)

    monkeypatch.setattr(schedule_search, "_divergence", counting)
    tolerance = 0.6 * divergence("llava", "1:0.05")
    config = search_schedule(model, prompts, PLPHPConfig.parse(f"g_search:tolerance={tolerance},groups={groups}"))
    begins = schedule_search.searched_layers(config, 1, 3)
    assert {max(schedule) for schedule in read} == set(begins)
    assert 0 < len(read) < schedule_search.most_readings(config, 3)
    assert set(read_schedule(str(config.options["schedule"]))) <= set(begins)
    last = divergence("llava", str(config.options["schedule"]))
    assert last <= tolerance + 1e-6  # the last group may spend all of it


def test_calibrate_finds_a_schedule_for_a_method_that_takes_one() -> None:
    model = tiny_model("llava")
    config = plphp.calibrate(model, prompts_of("llava"), PLPHPConfig.parse("g_search:tolerance=10"))
    assert config.options == {"schedule": "1:0", "tolerance": 10}  # all may leave at once
    assert not model.__dict__.get("generate")
    measured = plphp.measure_retention(model, prompts_of("llava"), config)
    assert measured.mean == pytest.approx(1 / 3, abs=0.1)  # one token stays in two of three layers


@pytest.mark.parametrize(
    ("line", "images", "message"),
    [
        ("g_search:tolerance=0", [1], "Within the tolerance of 0 nats no vision token can leave: give a larger one"),
        ("fastv:layer=1", [1], "The method 'fastv' takes no schedule: search for that of 'g_search'"),
        ("g_search", [0], "Prompt 1 has no vision token, and a search"),
        ("g_search", [1, 1], "Prompt 1 has 2 rows: a search takes prompts of one row"),
        ("g_search:target_retention=0.3", [1], "takes no rate, got 0.3: leave it out, and set the tolerance"),
        ("g_search", None, "No prompt was given"),
    ],
)
def test_what_a_search_refuses(line: str, images: list[int] | None, message: str) -> None:
    model = tiny_model("llava")
    prompts = [] if images is None else [TINY["llava"].inputs(model, images)]
    with pytest.raises(ConfigError, match=message):
        search_schedule(model, prompts, PLPHPConfig.parse(line))
    assert torch.isfinite(generate(model, TINY["llava"].inputs(model)).logits[0]).all()
