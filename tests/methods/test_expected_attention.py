# SPDX-License-Identifier: Apache-2.0
"""Expected attention keeps what its paper says, recomputed from the projected queries of a stock model."""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from test_generate import text_chunk
from test_methods import Reading, assert_best, half_up, reading, run
from torch import Tensor
from transformers import DynamicCache

import plphp
from invariants import assert_growing_frequencies_are_refused
from plphp import CacheStateError, ConfigError, PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.policy.rotation import Rotation
from plphp.pruning.scoring import Attended
from precision import assert_exact
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

ONE_AXIS = ("llava", "internvl", "smolvlm")
M_ROPE = ("qwen2-vl", "qwen2.5-vl")


def projected(found: Reading) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the projections of a stock model give before any rotation [q_heads, seq, dim], and its keys and values."""
    model, text = found.model, found.model.config.get_text_config()
    heard: list[Tensor] = []

    def hook(module: Any, args: Any, output: Tensor) -> None:
        heard.append(output[0].unflatten(-1, (text.num_attention_heads, -1)).transpose(0, 1))

    hooks = [layer.self_attn.q_proj.register_forward_hook(hook) for layer in model.get_decoder().layers]
    cache = DynamicCache(config=text)
    with torch.no_grad():
        model(**found.inputs, **passed(cache))
    for each in hooks:
        each.remove()
    return heard, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers]


def mean_rotation(theta: float, dim: int, positions: list[int]) -> Tensor:
    """The mean of rotation matrices, which turn i against i + dim / 2."""
    matrix = torch.zeros(dim, dim).double()
    for pair in range(dim // 2):
        angles = [position * theta ** (-2 * pair / dim) for position in positions]
        cos, sin = (sum(map(f, angles)) / len(angles) for f in (math.cos, math.sin))
        other = pair + dim // 2
        matrix[pair, pair] = matrix[other, other] = cos
        matrix[pair, other], matrix[other, pair] = -sin, sin
    return matrix


def naive(found: Reading, rows: list[int], future: list[int], epsilon: float) -> list[list[dict[int, float]]]:
    """The score of each vision token by layer and KV head."""
    all_queries, all_keys, all_values = projected(found)
    theta = found.model.config.get_text_config().rope_parameters["rope_theta"]
    result = []
    for queries, keys, values in zip(all_queries, all_keys, all_values, strict=True):
        dim, group = queries.shape[-1], len(queries) // found.kv_heads
        rotation = mean_rotation(theta, dim, future)
        heads = []
        for kv_head in range(found.kv_heads):
            attention = torch.zeros(found.length).double()
            for head in range(kv_head * group, (kv_head + 1) * group):
                own = queries[head, rows]
                mu = rotation @ own.mean(0)
                covariance = rotation @ torch.cov(own.T, correction=0) @ rotation.T
                logits = [
                    float(key @ mu / math.sqrt(dim) + key @ covariance @ key / (2 * dim)) for key in keys[kv_head, 4:]
                ]
                attention[4:] += torch.tensor(logits).double().softmax(0) / group
            weighed = (attention + epsilon) * values[kv_head].norm(dim=-1)
            heads.append({position: float(weighed[position]) for position in found.vision})
        result.append(heads)
    return result


def assert_kept(found: Reading, line: str, expected: list[list[dict[int, float]]]) -> None:
    _, layers = run(found, line)
    assert min(found.vision) >= 4
    for layer in layers:
        for head, kept in enumerate(layer.rows[0].kept_positions):
            assert_best(kept, expected[layer.layer][head], half_up(0.3 * len(found.vision)))


@pytest.mark.parametrize(("options", "future", "epsilon"), [("", 512, 0.0), ("n_future=3,epsilon=0.05,", 3, 0.05)])
@pytest.mark.parametrize("family", ONE_AXIS)
def test_it_keeps_what_the_paper_says(family: str, options: str, future: int, epsilon: float) -> None:
    found = reading(family)
    ahead = list(range(found.length, found.length + future))
    expected = naive(found, list(range(4, found.length)), ahead, epsilon)
    assert_kept(found, f"expected_attention:{options}retention_rate=0.3", expected)


@pytest.mark.parametrize("family", M_ROPE)
def test_with_m_rope_the_queries_of_text_count(family: str) -> None:
    """Before the first image and behind the last, where a position is one number."""
    found = reading(family)
    outside = [row for row in range(4, found.length) if row < found.vision[0] or row > found.vision[-1]]
    cache = PrunedCache.for_inputs(found.model, found.inputs, plphp.PLPHPConfig())
    assert cache.turn is not None
    end = found.length + int(cache.turn.after)
    assert end != found.length
    expected = naive(found, outside, list(range(end, end + 512)), 0.0)
    assert_kept(found, "expected_attention:retention_rate=0.3", expected)


def test_the_mean_of_rotations_is_that_of_rotated_vectors() -> None:
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.01]).double(), interleaved=True)
    vectors = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    begin = torch.tensor([[3], [11]])
    expected = torch.stack([rotation.rotated(vectors, begin + ahead) for ahead in range(7)]).mean(0)
    assert_exact(rotation.rotated_on_average(vectors, begin, 7), expected)


@torch.no_grad()
def test_a_prompt_in_chunks_asks_with_all_of_its_queries() -> None:
    """Queries are gathered chunk by chunk, and behind the prompt none of them is held any more."""
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [2, 1])
    config = PLPHPConfig(method="expected_attention", retention_rate=0.3)
    kept = []
    for chunks in ([inputs], text_chunk(model, inputs, inputs["input_ids"].shape[1] - 4)):
        cache = PrunedCache.for_inputs(model, inputs, config)
        reading = cache.reading
        for chunk in chunks:
            model(**chunk, **passed(cache))
        assert reading is not None
        assert (reading.kv.scores, reading.kv._gathered) == ({}, {})
        kept.append([[row.kept_positions for row in layer.rows] for layer in cache.report().prompts[0].layers])
    assert kept[0] == kept[1]


@torch.no_grad()
def test_states_are_let_go_layer_by_layer() -> None:
    """Once a layer is placed nothing but the cache holds keys or queries of it, though scores wait for the last."""
    model, before = tiny_model("llava"), []
    inputs = TINY["llava"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="expected_attention", retention_rate=0.3))
    reading = cache.reading
    assert reading is not None

    def watch(attended: Attended) -> None:
        assert [keys() for keys in before] == [None] * attended.layer
        before.append(weakref.ref(attended.entries.keys))

    seen = []

    def watched(placement: Tensor, layer: Any, compact: Any, **kwargs: Any) -> Tensor:
        states = [scores.states for scores in reading.kv.scores.values()]
        assert all(state.held == {} for state in states)
        done: Tensor = compact(placement, **kwargs)
        with pytest.raises(CacheStateError, match="empty"):
            states[-1].keys  # noqa: B018
        seen.append(layer)
        return done

    for layer in cache._pruned.values():
        layer.compact = partial(watched, layer=layer, compact=layer.compact)
    with cache.listening(watch):
        model(**inputs, **passed(cache))
    assert seen == list(cache._pruned.values())


def test_growing_frequencies_are_refused() -> None:
    model = tiny_model("llava")
    config = PLPHPConfig(method="expected_attention")
    assert_growing_frequencies_are_refused(model, TINY["llava"].inputs(model, [1]), config)


def test_rotations_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from plphp.engines.hf import rotation_probe

    model = tiny_model("llava")
    inputs, looked = TINY["llava"].inputs(model, [1]), []
    find = rotation_probe.find_rotations
    monkeypatch.setattr(rotation_probe, "find_rotations", lambda model: looked.append(1) or find(model))
    with plphp.prune(model, PLPHPConfig(method="uniform")):
        model.generate(**inputs, max_new_tokens=1)
    assert looked == []
    with plphp.prune(model, PLPHPConfig(method="expected_attention")):
        model.generate(**inputs, max_new_tokens=1)
        model.generate(**inputs, max_new_tokens=1)
    assert looked == [1]


@pytest.mark.parametrize("option", ["n_future=0", "epsilon=-1"])
def test_options_out_of_range_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=option.split("=")[0]):
        plphp.prune(tiny_model("llava"), PLPHPConfig.parse(f"expected_attention:{option}")).__enter__()
