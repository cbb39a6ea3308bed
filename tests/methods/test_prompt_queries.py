# SPDX-License-Identifier: Apache-2.0
"""The prompt's own queries turned to behind it, recomputed from the projected queries of a stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_adakv import algorithm_1
from test_expected_attention import mean_rotation
from test_generate import text_chunk
from test_methods import Reading, assert_best, half_up, reading, run
from torch import Tensor
from transformers import DynamicCache

import plphp
from invariants import (
    assert_growing_frequencies_are_refused,
    assert_same_generation,
    evicted_entries_masked,
    pruned,
    two_turns,
)
from plphp import ConfigError, PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.pruning.report import PruneReport
from precision import EXACT
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

M_ROPE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
FAMILIES = ("llava", "internvl", "smolvlm", "gemma3", *M_ROPE)
RATE = 0.3


def kept(report: PruneReport) -> list[list[list[list[int]]]]:
    """Kept positions by layer, row and KV head."""
    return [[row.kept_positions for row in layer.rows] for layer in report.prompts[0].layers]


def asking(found: Reading, rows: int, m_rope: bool) -> list[int]:
    """Text and vision behind the first 4 tokens; with m-RoPE the text outside of the images alone."""
    text = [row for row in range(4, found.length) if row < found.vision[0] or row > found.vision[-1]]
    tokens = text if m_rope else list(range(4, found.length))
    taken = min(rows, len(tokens))
    return [tokens[(number + 1) * len(tokens) // taken - 1] for number in range(taken)]


def projected(found: Reading) -> tuple[list[Tensor], DynamicCache]:
    """Queries of every layer of a stock model before any rotation, [q_heads, seq, dim], and what it caches."""
    model, heads = found.model, found.model.config.get_text_config().num_attention_heads
    heard: list[Tensor] = []

    def hook(module: Any, args: Any, output: Tensor) -> None:
        states = output if output.dim() == 4 else output.unflatten(-1, (heads, -1))
        heard.append((states if states.shape[1] == heads else states.transpose(1, 2))[0])

    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    hooks = [getattr(each, "q_norm", each.q_proj).register_forward_hook(hook) for each in attentions]
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**found.inputs, **passed(cache))
    for each in hooks:
        each.remove()
    return heard, cache


def masses(found: Reading, rows: list[int], asked_from: int) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer: mass [q_heads, rows, vision] of queries that are asked from a rotary position, and norms of values."""
    queries, cache = projected(found)
    text = found.model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(queries)
    theta = text.rope_parameters.get("full_attention", text.rope_parameters)["rope_theta"]
    result = {}
    for number, layer in enumerate(found.model.get_decoder().layers):
        if kinds[number] != "full_attention":
            continue
        keys, values = cache.layers[number].keys[0], cache.layers[number].values[0]
        turned = queries[number][:, rows] @ mean_rotation(theta, keys.shape[-1], [asked_from]).T
        group = len(turned) // len(keys)
        mass = (turned @ keys.repeat_interleave(group, dim=0).mT * layer.self_attn.scaling).softmax(-1)
        result[number] = mass[..., found.vision], values[:, found.vision].norm(dim=-1)
    return result


def score(mass: Tensor, norms: Tensor, kv_heads: int, reduce: str, value_norm: int) -> Tensor:
    """What the docstring of the method says, [kv_heads, vision]."""
    grouped = mass.unflatten(0, (kv_heads, -1)).mean(1)
    mean = grouped.mean(1)
    if reduce == "mean":
        result = mean
    elif reduce == "peak":
        result = mass.amax(1).unflatten(0, (kv_heads, -1)).mean(1)
    else:
        best = grouped.argsort(dim=-1, descending=True).argsort(dim=-1).amin(1)
        result = 1 / (2 + best - mean / mean.amax(-1, keepdim=True))
    return result * norms if value_norm else result


@pytest.mark.parametrize(
    ("rows", "ahead", "reduce", "value_norm"),
    [(128, 10, "best_rank", 1), (5, 0, "mean", 1), (3, 40, "peak", 0), (7, 10, "best_rank", 0)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_keeps_what_its_queries_look_at_from_behind(
    family: str, rows: int, ahead: int, reduce: str, value_norm: int
) -> None:
    found = reading(family)
    turn = PrunedCache.for_inputs(found.model, found.inputs, plphp.PLPHPConfig()).turn
    delta = 0 if turn is None else int(turn.after)
    assert (delta != 0) == (family in M_ROPE)
    tokens = asking(found, rows, family in M_ROPE)
    expected = masses(found, tokens, found.length + delta + ahead)
    options = f"rows={rows},ahead={ahead},reduce={reduce},value_norm={value_norm},retention_rate={RATE}"
    places = half_up(RATE * len(found.vision))
    for heads in ("equal", "ragged"):
        line = f"prompt_queries:{options},heads={heads}" if heads == "equal" else f"prompt_queries:{options}"
        _, layers = run(found, line)
        assert [layer.layer for layer in layers] == list(expected)
        for layer in layers:
            mass, norms = expected[layer.layer]
            [row] = layer.rows
            assert row.vision_score == pytest.approx(mass.sum(-1).mean().item(), abs=EXACT)
            of_heads = score(mass, norms, found.kv_heads, reduce, value_norm)
            scores = [dict(zip(found.vision, head.tolist(), strict=True)) for head in of_heads]
            if heads == "ragged":
                assert [set(positions) for positions in row.kept_positions] == algorithm_1(scores, places, 0.2)
                continue
            for positions, head in zip(row.kept_positions, scores, strict=True):
                assert_best(positions, head, places)


def test_ahead_and_rows_change_what_is_kept() -> None:
    found = reading("llava")
    layers = [run(found, f"prompt_queries:{options},retention_rate=0.3")[1] for options in ("rows=128", "ahead=90")]
    layers.append(run(found, "prompt_queries:rows=2,retention_rate=0.3")[1])
    assert layers[0] == run(found, "prompt_queries:ahead=10,retention_rate=0.3")[1]
    assert layers[0] != layers[1] != layers[2] != layers[0]


CHUNKED = [family for family in (*FAMILIES, "qwen3.5") if TINY[family].stock.chunked_prefill]


@pytest.mark.parametrize("family", CHUNKED)
def test_a_prompt_in_chunks_asks_with_all_of_its_queries(family: str) -> None:
    """Of rows of different lengths, whose queries that ask are spread over the chunks differently."""
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    config = PLPHPConfig.parse("prompt_queries:rows=9,retention_rate=0.3")
    whole, expected = pruned(model, inputs, config)
    chunks, report = pruned(model, inputs, config, prefill_chunk_size=7)
    assert_same_generation(whole, chunks)
    assert kept(report) == kept(expected)


@torch.no_grad()
def test_no_query_is_held_behind_the_prompt() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [2, 1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="prompt_queries", retention_rate=RATE))
    reading = cache.reading
    assert reading is not None
    assert reading.kv.turned is not None
    first, second = text_chunk(model, inputs, inputs["input_ids"].shape[1] - 4)
    model(**first, **passed(cache))
    assert reading.kv.turned._held.keys() == set(range(len(cache.layers)))
    model(**second, **passed(cache))
    assert (reading.kv.scores, reading.kv._gathered, reading.kv.turned._held) == ({}, {}, {})


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
def test_a_later_turn_asks_with_its_own_queries(family: str) -> None:
    """Behind a pruned first turn, whose padding differs by row."""
    model, tiny = tiny_model(family), TINY[family]
    config = PLPHPConfig.parse("prompt_queries:rows=9,retention_rate=0.3")
    cache = PrunedCache.for_inputs(model, tiny.inputs(model, (2, 1)), config)
    first, second = two_turns(model, tiny, cache, tiny.stock.second_turn_image, (2, 1))
    report = cache.report()
    assert len(report.prompts) == 1 + tiny.stock.second_turn_image
    stock = DynamicCache(config=model.config.get_text_config())
    with evicted_entries_masked(model, report):
        expected = two_turns(model, tiny, stock, tiny.stock.second_turn_image, (2, 1))
    assert_same_generation(expected[0], first)
    assert_same_generation(expected[1], second)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_beams_are_placed_like_their_prompt(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 1])
    config = PLPHPConfig(method="prompt_queries", retention_rate=RATE)
    _, greedy = pruned(model, inputs, config)
    _, beams = pruned(model, inputs, config, num_beams=3)
    for single, layer in zip(greedy.prompts[0].layers, beams.prompts[0].layers, strict=True):
        expected = [row.kept_positions for row in single.rows for _ in range(3)]
        assert [row.kept_positions for row in layer.rows] == expected


def test_a_model_whose_rotation_is_not_known_is_refused() -> None:
    model = tiny_model("llava")
    config = PLPHPConfig(method="prompt_queries")
    assert_growing_frequencies_are_refused(model, TINY["llava"].inputs(model, [1]), config)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rows=0", "'rows'.*at least 1, got 0"),
        ("ahead=-1", "'ahead'.*at least 0, got -1"),
        ("reduce=max", "'reduce'.*got 'max'"),
        ("bank=bundled", "Unknown setting 'bank'"),
        ("query_rows=text", "spread over the prompt, got query_rows='text': leave it out"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: str, words: str) -> None:
    model = tiny_model("llava")
    with pytest.raises(ConfigError, match=words):
        pruned(model, TINY["llava"].inputs(model, [1]), PLPHPConfig.parse(f"prompt_queries:{setting}"))
