# SPDX-License-Identifier: Apache-2.0
"""MixKV keeps what its paper says, recomputed one number at a time from a stock model."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_methods import FAMILIES, Reading, assert_best, half_up, reading, run, window_score
from transformers import DynamicCache

import plphp
from plphp import ConfigError, PLPHPConfig
from plphp.engines.hf.cache_argument import passed
from plphp.methods.registry import chain_of
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def keys_of(family: str) -> list[list[list[list[float]]]]:
    """Keys of a stock model, [layer][kv_head][position][dim]."""
    found = reading(family)
    cache = DynamicCache(config=found.model.config.get_text_config())
    with torch.no_grad():
        found.model(**found.inputs, **passed(cache))
    return [layer.keys[0].tolist() for layer in cache.layers]


def moved(values: dict[int, float], mean: float) -> dict[int, float]:
    low, high = min(values.values()), max(values.values())
    share = {j: (value - low) / (high - low + 1e-8) for j, value in values.items()}
    factor = mean / (sum(share.values()) / len(share) + 1e-8)
    return {j: value * factor for j, value in share.items()}


def mixed(found: Reading, family: str, layer: int, head: int, importance: dict[int, float]) -> dict[int, float]:
    """The score of the vision tokens that have an importance."""
    units = []
    for key in keys_of(family)[layer][head]:
        length = math.sqrt(sum(x * x for x in key))
        units.append([x / length for x in key])
    number = len(units)
    center = [sum(column) / number for column in zip(*units, strict=True)]
    pairs = [
        sum(a * b for a, b in zip(units[i], units[j], strict=True))
        for i in range(number)
        for j in range(number)
        if i != j
    ]
    weight = min(1.0, max(0.0, sum(pairs) / len(pairs)))  # the mean likeness of two keys
    mean = sum(importance.values()) / len(importance)
    likeness = {j: sum(a * b for a, b in zip(units[j], center, strict=True)) for j in importance}
    diverse = moved({j: -value for j, value in likeness.items()}, mean)
    norms = moved({j: found.norms[layer][head][j] for j in importance}, mean)
    return {j: weight * diverse[j] + (1 - weight) * (importance[j] + norms[j]) for j in importance}


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_window_it_keeps_what_the_paper_says(family: str) -> None:
    found = reading(family)
    _, layers = run(found, "mixkv:window=4,kernel=3,retention_rate=0.3")
    assert max(found.vision) < found.length - 4
    for layer in layers:
        for head, kept in enumerate(layer.rows[0].kept_positions):
            all_scores = window_score(found, layer.layer, head, 4, 3, "avg")
            importance = {j: all_scores[j] for j in found.vision}
            score = mixed(found, family, layer.layer, head, importance)
            assert_best(kept, score, half_up(0.3 * len(found.vision)))


def test_vision_tokens_inside_the_window_come_first() -> None:
    """They have no importance and are no part of what is scaled."""
    found = reading("llava")
    window = found.length - found.vision[-4]
    _, layers = run(found, f"mixkv:window={window},kernel=1,retention_rate=0.3")
    inside = [j for j in found.vision if j >= found.length - window]
    before = [j for j in found.vision if j not in inside]
    for layer in layers:
        for head, kept in enumerate(layer.rows[0].kept_positions):
            assert set(inside) <= set(kept)
            all_scores = window_score(found, layer.layer, head, window, 1, "avg")
            score = mixed(found, "llava", layer.layer, head, {j: all_scores[j] for j in before})
            assert_best([j for j in kept if j in before], score, half_up(0.3 * len(found.vision)) - len(inside))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the tiny LLaVA."""
    model = tiny_model("llava")
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    plphp.collect_query_bank(model, [TINY["llava"].inputs(model, [1])], max_new_tokens=4).save(path)
    return path


def test_on_a_bank_the_largest_attention_is_the_importance(bank: Path) -> None:
    found = reading("llava")
    _, by_peak = run(found, f"query_bank:bank={bank},reduce=peak,value_norm=0,heads=equal,retention_rate=0.3")
    _, layers = run(found, f"mixkv:host=bank,bank={bank},retention_rate=0.3")
    assert len(layers) == len(by_peak)
    for layer in layers:
        importances = peaks(found, bank, layer.layer)
        for head, kept in enumerate(layer.rows[0].kept_positions):
            peak = {j: importances[head][j] for j in found.vision}
            assert_best(by_peak[layer.layer].rows[0].kept_positions[head], peak, half_up(0.3 * len(found.vision)))
            assert_best(kept, mixed(found, "llava", layer.layer, head, peak), half_up(0.3 * len(found.vision)))


def peaks(found: Reading, path: Path, layer: int) -> list[list[float]]:
    """Per KV head, the largest attention of any query of a bank, the mean over the query heads of each."""
    from plphp.policy.bank import QueryBank

    bank = QueryBank.load(path)
    keys = torch.tensor(keys_of("llava")[layer]).double()
    group = found.model.config.get_text_config().num_attention_heads // found.kv_heads
    position = (found.length + bank.ahead)[None]
    queries = bank.of(layer).at(position, group * found.kv_heads, keys.shape[-1])[0]
    result = []
    for head in range(found.kv_heads):
        mine = queries[head * group : (head + 1) * group]
        mass = (mine @ keys[head].T / math.sqrt(keys.shape[-1])).softmax(-1)
        result.append(mass.amax(1).mean(0).tolist())
    return result


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mixkv:host=bank", ["plphp collect"]),
        ("mixkv:bank=bundled", ["host=bank"]),
        ("mixkv:host=bank,bank=bundled,window=4", ["window"]),
        ("mixkv:host=bank,bank=bundled,query_rows=text", ["query_rows"]),
        ("mixkv:host=bank,bank=bundled", ["decoder layers", "and this one has 3"]),
        ("mixkv:host=other", ["host"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(line: str, words: Sequence[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        chain_of(PLPHPConfig.parse(line), 3)
    assert all(word in str(refusal.value) for word in words)
