# SPDX-License-Identifier: Apache-2.0
"""Attention of prefill among important tokens alone, and what the KV cache holds behind it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import plphp
from attending_reference import Rule, choosing, unimportant_masked, unimportant_tokens
from invariants import (
    assert_padded_rows_are_the_rows_alone,
    assert_same_generation,
    attention_set,
    generate,
    logit_difference,
    pruned,
    two_turns,
)
from left_masked import left_tokens_masked
from plphp import ConfigError, PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf import attention
from plphp.engines.hf.cache_argument import passed
from plphp.pruning.report import PruneReport
from precision import assert_exact
from test_invariants import FAMILIES, FULL, pruned_layers
from tier_reference import entries_replaced, noting_what_is_held
from tiny_models import TIERS, TINY, tiers_model, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

ADAPTIVE = "zipvl:tau=0.7,query_rows=4,random_rows=6"
FIXED = "zipvl:retention_rate=0.4,query_rows=4,random_rows=6"
ROWS = ([1], [2, 0, 1])
KINDS = ("llava", "qwen2-vl", "gemma3")
"""Plain, with m-RoPE, with sliding windows."""
PAIRS = [(family, line) for family in FAMILIES for line in (ADAPTIVE, FIXED) if line == ADAPTIVE or family in KINDS]


def assert_some_attended(report: PruneReport, model: Any) -> None:
    for prompt in report.prompts:
        assert [layer.layer for layer in prompt.attention] == pruned_layers(model)
        for layer in prompt.attention:
            assert 0 < sum(layer.attended) < sum(layer.computed)
        assert prompt.attended_share < 1


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(("family", "line"), PAIRS)
def test_the_rest_is_masked_and_its_attention_is_zero(family: str, line: str, rows: list[int]) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), rows)
    output, report = pruned(model, inputs, PLPHPConfig.parse(line))
    assert_some_attended(report, model)
    with unimportant_masked(model, report):
        assert_same_generation(generate(model, inputs), output)
    assert logit_difference(generate(model, inputs), output) > 1e-4


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_turn_attends_to_what_the_cache_holds(family: str, with_image: bool) -> None:
    model, tiny, rows = tiny_model(family), TINY[family], [2, 1]
    cache = PrunedCache.for_inputs(model, tiny.inputs(model, rows), PLPHPConfig.parse(ADAPTIVE))
    turns = two_turns(model, tiny, cache, with_image, rows)
    report = cache.report()
    assert len(report.prompts) == 1 + with_image
    assert_some_attended(report, model)
    del cache
    with unimportant_masked(model, report):
        expected = two_turns(model, tiny, DynamicCache(config=model.config.get_text_config()), with_image, rows)
    for output, reference in zip(turns, expected, strict=True):
        assert_same_generation(reference, output)


@pytest.mark.parametrize("line", ["zipvl:tau=1", "zipvl:retention_rate=1.0"])
@pytest.mark.parametrize("family", KINDS)
def test_all_important_is_stock(family: str, line: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    output, report = pruned(model, inputs, PLPHPConfig.parse(line))
    assert_same_generation(generate(model, inputs), output)
    assert (report.retention, report.prompts[0].attended_share) == (1.0, 1.0)


@pytest.mark.parametrize(("family", "line"), PAIRS)
def test_a_padded_row_is_the_row_alone(family: str, line: str) -> None:
    assert_padded_rows_are_the_rows_alone(tiny_model(family), TINY[family], PLPHPConfig.parse(line))


@pytest.mark.parametrize(("recent", "drawn", "tau"), [(4, 6, 0.7), (1, 0, 0.9), (3, 1000, 0.5)])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "smolvlm", "internvl"])
def test_each_layer_chooses_by_the_formulas(family: str, recent: int, drawn: int, tau: float) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    line = f"zipvl:tau={tau},query_rows={recent},random_rows={drawn},seed=5"
    output, report = pruned(model, inputs, PLPHPConfig.parse(line))
    [prompt] = report.prompts
    vision = torch.zeros(report.batch, prompt.end, dtype=torch.bool)
    for row, images in enumerate(prompt.images):
        vision[row, [position for image in images for position in image.positions]] = True
    rule = Rule(tau, recent, drawn, vision, inputs["attention_mask"].bool(), 5)
    with choosing(model, rule) as chosen:
        assert_same_generation(generate(model, inputs), output)
    for layer in prompt.attention:
        rest = [
            sorted(set(vision[row].nonzero()[:, 0].tolist()) - set(positions))
            for row, positions in enumerate(layer.positions)
        ]
        assert rest == chosen[layer.layer]
    if tau < 0.9:
        assert len({tuple(layer.attended) for layer in prompt.attention}) > 1


@pytest.mark.parametrize("line", [ADAPTIVE, FIXED, f"{ADAPTIVE},score_pool=3,image_quota=per_image,min_kept=3"])
def test_the_cache_drops_what_did_not_attend(line: str) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2, 1])
    _, report = pruned(model, inputs, PLPHPConfig.parse(line))
    [prompt] = report.prompts
    for layer, attended in zip(prompt.layers, prompt.attention, strict=True):
        for row, positions in zip(layer.rows, attended.positions, strict=True):
            assert row.kept_positions == [positions, positions]
            assert len(positions) == int(row.rate * row.vision_tokens + 0.5) or "per_image" in line
    if line == FIXED:
        assert report.retention == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("rung", ["kivi2", "kivi4", "r3"])
@pytest.mark.parametrize("family", KINDS)
def test_the_rest_is_held_in_few_bits(family: str, rung: str) -> None:
    """Prefill is that of the run that drops them; later queries see what the codes stand for."""
    model = tiers_model(family)
    inputs = TIERS[family].inputs(model, [2, 0, 1])
    config = PLPHPConfig.parse(f"{ADAPTIVE},unimportant={rung}")
    with noting_what_is_held() as notes:
        cache = PrunedCache.for_inputs(model, inputs, config)
        output = generate(model, inputs, **passed(cache))
    report = cache.report()
    [prompt] = report.prompts
    for layer, attended in zip(prompt.layers, prompt.attention, strict=True):
        for row, positions in zip(layer.rows, attended.positions, strict=True):
            vision = row.vision_tokens
            assert [len(head) for head in row.kept_positions] == [vision] * len(row.kept_positions)
            coded = [set(head) for tier in row.tiers for head in tier.positions]
            if vision:
                assert [tier.rung for tier in row.tiers] == [rung]
                assert all(len(head) == vision - len(positions) and not head & set(positions) for head in coded)
    assert report.kv_bytes < report.kv_bytes_full
    with entries_replaced(model, cache, notes, unimportant_tokens(report)):
        assert_same_generation(generate(model, inputs), output)


@pytest.mark.parametrize("family", KINDS)
def test_a_later_turn_attends_to_codes(family: str) -> None:
    model, tiny, rows = tiers_model(family), TIERS[family], [2, 1]
    config = PLPHPConfig.parse(f"{ADAPTIVE},unimportant=kivi4")
    with noting_what_is_held() as notes:
        cache = PrunedCache.for_inputs(model, tiny.inputs(model, rows), config)
        turns = two_turns(model, tiny, cache, True, rows)
    rest = unimportant_tokens(cache.report())
    assert all(len(prompts) == 2 for prompts in rest.values())
    with entries_replaced(model, cache, notes, rest):
        expected = two_turns(model, tiny, DynamicCache(config=model.config.get_text_config()), True, rows)
    for output, reference in zip(turns, expected, strict=True):
        assert_same_generation(reference, output)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("family", KINDS)
def test_beams_and_samples(family: str, kwargs: dict[str, Any]) -> None:
    images = min(2, TINY[family].stock.expanded_images)
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [images, 1])
    torch.manual_seed(0)
    output, report = pruned(model, inputs, PLPHPConfig.parse(ADAPTIVE), **kwargs)
    assert report.batch > 2
    with unimportant_masked(model, report):
        torch.manual_seed(0)
        assert_same_generation(generate(model, inputs, **kwargs), output)


def test_eager_attention() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2, 0, 1])
    expected, _ = pruned(model, inputs, PLPHPConfig.parse(ADAPTIVE))
    with attention_set(model, "eager"):
        output, _ = pruned(model, inputs, PLPHPConfig.parse(ADAPTIVE))
    assert_same_generation(expected, output)


def test_exempt_layers_attend_as_ever() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2, 1])
    output, report = pruned(model, inputs, dataclasses.replace(PLPHPConfig.parse(ADAPTIVE), exempt_layers=(0, -1)))
    [prompt] = report.prompts
    assert [layer.layer for layer in prompt.attention] == [1]
    assert [layer.rows[0].layer_class for layer in prompt.layers] == ["exempt", "uniform", "exempt"]
    with unimportant_masked(model, report):
        assert_same_generation(generate(model, inputs), output)


def test_work_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention function of the model is given as many queries, keys and values as the report says."""
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2, 1])
    shapes: list[tuple[int, int, int]] = []
    stock = attention.stock_attention

    def counting(base: str, module: Any) -> Any:
        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kw: Any) -> Any:
            shapes.append((query.shape[2], key.shape[2], value.shape[2]))
            return stock(base, module)(module, query, key, value, mask, **kw)

        return attend

    monkeypatch.setattr(attention, "stock_attention", counting)
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(ADAPTIVE))
    with torch.no_grad():
        model(**inputs, **passed(cache))
    [prompt] = cache.report().prompts
    assert shapes == [(most, most, most) for most in (max(layer.attended) for layer in prompt.attention)]
    assert prompt.computed == []
    computed = int(inputs["attention_mask"].sum())
    assert [sum(layer.computed) for layer in prompt.attention] == [computed] * 3


@pytest.mark.parametrize("before", ["encoder_random:retention_rate=0.6", "fastv:layer=1,retention_rate=0.7"])
@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_behind_a_method_that_lets_tokens_leave(family: str, before: str) -> None:
    """With all of what stays important it is that method alone; else fewer attend, and prompts with padding agree."""
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    alone, _ = pruned(model, inputs, PLPHPConfig.parse(before))
    output, report = pruned(model, inputs, PLPHPConfig.parse(f"{before}+zipvl:tau=1"))
    assert_same_generation(alone, output)
    with left_tokens_masked(model, report):
        assert_same_generation(generate(model, inputs), output)
    chain = PLPHPConfig.parse(f"{before}+{ADAPTIVE}")
    _, report = pruned(model, inputs, chain)
    [prompt] = report.prompts
    assert [sum(layer.computed) for layer in prompt.attention] == prompt.computed
    assert prompt.attended_share < 1
    assert_padded_rows_are_the_rows_alone(model, TINY[family], chain)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_row_of_a_branch_is_the_run(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2])
    config = PLPHPConfig.parse(ADAPTIVE)
    branches = plphp.branch(model, inputs, [PLPHPConfig.parse("uniform"), config])
    cache = PrunedCache.for_inputs(model, inputs, config)
    draft = torch.tensor([[5, 6, 7]])
    logits = model(input_ids=draft.expand(2, -1), **passed(branches.cache)).logits
    with torch.no_grad():
        first = model(**inputs, **passed(cache)).logits[:, -1]
        alone = model(input_ids=draft, **passed(cache)).logits
    assert_exact(branches.logits[1:], first)
    assert_exact(logits[1:], alone)


def test_a_branch_over_shared_windows_is_refused() -> None:
    model, inputs = tiny_model("gemma3"), TINY["gemma3"].inputs(tiny_model("gemma3"), [2])
    with pytest.raises(UnsupportedFeatureError, match="'zipvl' would leave other tokens in them"):
        plphp.branch(model, inputs, [PLPHPConfig.parse(ADAPTIVE)])


@pytest.mark.parametrize("family", [name for name in FULL if TINY[name].stock.chunked_prefill][:2])
def test_a_prompt_in_chunks_is_refused(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [1])
    with (
        plphp.prune(model, PLPHPConfig.parse(ADAPTIVE)),
        pytest.raises(UnsupportedFeatureError, match=r"Zipvl chooses tokens while .* and got 7 of its"),
    ):
        generate(model, inputs, prefill_chunk_size=7)


def test_flash_attention_is_refused() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [1])
    with (
        attention_set(model, "flash_attention_2", model.get_decoder()),
        pytest.raises(UnsupportedFeatureError, match=r"zipvl .* was not tried with flash attention"),
    ):
        PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(ADAPTIVE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tau=0.9,target_retention=0.5", "tau or target_retention, not both"),
        ("tau=0.9,retention_rate=0.5", "tau or retention_rate, not both"),
        ("heads=ragged", "the same tokens for all heads of a layer"),
        ("tiers=kivi2", "name the rung of the others, as in zipvl:unimportant=kivi2"),
        ("attention=dense,unimportant=kivi2", "has no important tokens, and unimportant says"),
        ("attention=dense,random_rows=3", "has no important tokens, and random_rows says"),
        ("unimportant=pq", "'unimportant' of the method 'zipvl' must be one of 'dropped', 'kivi4'"),
    ],
)
def test_settings_that_cannot_be(options: str, message: str) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [1])
    with pytest.raises(ConfigError, match=message):
        PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(f"zipvl:{options}"))
