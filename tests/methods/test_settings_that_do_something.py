# SPDX-License-Identifier: Apache-2.0
"""All methods x all settings and options: a value that is taken changes what a run does, and others are refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import plphp
from plphp import ConfigError, PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf.cache_argument import passed
from plphp.methods.registry import available_methods
from plphp.settings.config import SETTINGS
from plphp.settings.options import Option
from tiny_models import TIERS, tiers_model

CLASSES = "attentive_threshold=0.7,indifferent_threshold=0.5"
"""Which put a layer of the tiny model into each class."""
LINES = [
    "adakv",
    "cdpruner",
    "divprune",
    "dpp",
    "encoder_random",
    "expected_attention",
    "fastv:layer=1",
    "fastv:layer=1,retention_rate=0.6,evidence=bank,bank=BANK",
    "fopru",
    "g_search:schedule=1:.5",
    "mixkv:host=bank,bank=BANK",
    "none",
    "oracle",
    "p_sigmoid",
    f"plphp:{CLASSES}",
    "plphp:target_retention=0.4",
    'plphp:tiers="kivi4=.2,kivi2=.3"',
    "pool",
    "prompt_queries",
    "pyramiddrop",
    "pyramiddrop:factor=0.5",
    "pyramidkv",
    "quantized:tiers=kivi2,read=0.5",
    "query_bank:bank=BANK",
    "random",
    f"recall_rank:layers=vision_attention,{CLASSES}",
    f"shared:{CLASSES}",
    "snapkv",
    "snapkv_vision",
    "tgv_kv",
    "uniform:heads=ragged",
    'uniform:tiers="kivi4=.2,kivi2=.3"',
    "value_norm",
    "visionzip",
    "vl_cache",
    "vtc_cls",
    "vtw",
    "zipvl:query_rows=4,random_rows=4",
    "zipvl:query_rows=4,random_rows=4,unimportant=kivi2",
    "zipvl:attention=dense",
]
"""Every method, with what it needs, once for each way in which it reads its settings."""
ANYWHERE = {
    "method": "is what has the settings",
    "seed": "a chain, and a run of plphp eval, give theirs to all methods",
    "calibrated_layers": "a record, by which users are warned",
    "tolerance": "of the search for a schedule, see test_schedule_search",
    "groups": "likewise",
    "collect": "of a bank that is collected, see test_own_bank",
    "folder": "likewise",
    "bank": "names a file",
}
"""Settings that change nothing here, and why they may."""
VALUES: dict[str, list[Any]] = {
    "retention_rate": [0.7, 0.9],
    "retention_delta": [0.1, 0.0],
    "attentive_threshold": [0.9],
    "indifferent_threshold": [0.0],
    "target_retention": [0.7, 0.9],
    "class_quantile": [0.5, 0.01],
    "exempt_layers": ["1"],
    "query_rows": [3, 7, "text"],
    "gqa_reduction": ["max"],
    "image_quota": ["per_image"],
    "score_pool": [3, 5],
    "min_kept": [30],
    "heads": ["ragged", "equal"],
    "head_safeguard": [1.0, 0.0],
    "tiers": ["kivi2"],
    "read": [0.5, 0.1],
    "rest": ["false"],
    "books": ["bundled"],
    "vision_budget": ["4kB", "2 tokens"],
    "fading": ["oldest"],
    "tier_device": ["cpu"],
}
SEEDS = (0, 1, 2, 3)
"""Of prompts, since a value may change nothing of a tiny one by chance; where the first changes, no other is read."""
OF_STEPS = ("exempt_layers", "tiers", "read", "rest", "books", "vision_budget")
"""Settings whose effect a decoding step shows."""
TRUE_ALREADY = {("none", "query_rows"): "decides what the vision attention scores of the report are of"}
"""Pairs of a method and a setting that change the report alone."""


def values_of(option: Option) -> list[Any]:
    """Some values of an option that are not its default, as far from it as its range allows."""
    if option.choices:
        return [choice for choice in option.choices if choice != option.default]
    if option.default is None:
        return [0.2, 0.9]
    assert not isinstance(option.default, str)
    near: list[float] = [option.default + 1, option.default + 2, option.default / 2, option.default * 10]
    values = [type(option.default)(value) for value in [*near, 1, 3, 0.3, 0]]
    return [value for value in dict.fromkeys(values) if value != option.default and option.accepts(value)]


def setting_values(line: str) -> Iterator[tuple[str, list[Any]]]:
    """The settings and options that a line leaves open, with values."""
    method = available_methods()[line.partition(":")[0]]
    own = "equal" if method.kv is None else method.kv.heads
    given = {part.split("=")[0] for part in line.split(":", 1)[-1].split(",")} - {*CLASSES.replace(",", "=").split("=")}
    for name, values in {**VALUES, **{name: values_of(o) for name, o in options_of(method).items()}}.items():
        if name not in given | ANYWHERE.keys():
            yield name, [value for value in values if (name, value) != ("heads", own)]


def options_of(method: Any) -> dict[str, Option]:
    """The options of a method without those that are a text of any kind."""
    return {
        name: option for name, option in method.options.items() if option.choices or not isinstance(option.default, str)
    }


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A query bank of the tiny model."""
    path = tmp_path_factory.mktemp("banks") / "bank.safetensors"
    model, tiny = tiers_model("llava"), TIERS["llava"]
    prompts = [tiny.inputs(model, [1], seed=seed) for seed in (1, 2)]
    plphp.collect_query_bank(model, prompts, max_new_tokens=8).save(path)
    return path


@functools.cache
def outcome(line: str, seed: int, steps: bool) -> str:
    """All that a run says and keeps of a prompt with two images, and what it says with a decoding step behind it."""
    model, config = tiers_model("llava"), PLPHPConfig.parse(line)
    inputs = TIERS["llava"].inputs(model, [2], seed=seed)
    if config.method == "oracle":
        branched = plphp.branch(model, inputs, [config], answer_ids=torch.tensor([5, 6, 7, 8]))
        return str(branched.cache.report().prompts)
    cache = PrunedCache.for_inputs(model, inputs, config)
    with torch.no_grad(), nullcontext() if cache.chain.tower is None else cache.tower_recorded():
        logits = [model(**inputs, **passed(cache)).logits[:, -1]]
        if steps:
            logits.append(model(input_ids=torch.tensor([[9]]), **passed(cache)).logits[:, -1])
    [prompt] = cache.report().prompts
    kept = [[(row.rate, row.kept_positions, row.evicted_text) for row in layer.rows] for layer in prompt.layers]
    return str([kept, prompt.stages, [step.tolist() for step in logits]])


def does_something(line: str, name: str, values: list[Any]) -> bool:
    """Whether any of the values changes a run, or all are refused by name."""
    refused: list[tuple[Any, str]] = []
    steps = name in OF_STEPS
    for value in values:
        changed = f"{line}{',' if ':' in line else ':'}{name}={value}"
        try:
            if any(outcome(changed, seed, steps) != outcome(line, seed, steps) for seed in SEEDS):
                return True
        except (ConfigError, UnsupportedFeatureError) as error:
            refused.append((value, str(error)))
    assert all(name in message or str(value) in message for value, message in refused)
    return len(refused) == len(values)


@pytest.mark.parametrize("line", LINES)
def test_a_setting_does_something_or_is_refused(line: str, bank: Path) -> None:
    method, line = line.partition(":")[0], line.replace("BANK", str(bank))
    silent = [name for name, values in setting_values(line) if not does_something(line, name, values)]
    assert [name for name in silent if (method, name) not in TRUE_ALREADY] == []


def test_every_method_and_every_setting_is_looked_at() -> None:
    assert {line.partition(":")[0] for line in LINES} == {
        name for name, method in available_methods().items() if type(method).__module__.startswith("plphp.")
    }
    assert set(SETTINGS) == VALUES.keys() | {"method", "seed", "calibrated_layers"}
