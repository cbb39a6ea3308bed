# SPDX-License-Identifier: Apache-2.0
"""Methods of different stages, one behind the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import plphp
from invariants import assert_same_generation, evicted_entries_masked, generate, pruned
from plphp import ConfigError, PLPHPConfig, UnsupportedFeatureError
from plphp.cli._settings import read_settings
from plphp.engines.hf.cache_argument import passed
from plphp.evaluation import make_variants
from plphp.extend import Chosen, EncoderStage, KVStage, Method, keep_all, per_head, register_method
from plphp.methods.registry import METHODS_BY_NAME, chain_of
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

PREFILL = (
    "fastv:layer=1,retention_rate=0.7",
    "fastv:layer=2,retention_rate=0.8",
    "vtw:retention_rate=0.6",
    "pyramiddrop:retention_rate=0.6",
    "p_sigmoid:retention_rate=0.6",
)
KV = (
    "uniform:retention_rate=0.4",
    "plphp:target_retention=0.5",
    "recall_rank:retention_rate=0.4",
    "snapkv:window=3,retention_rate=0.4",
    "vl_cache:retention_rate=0.5",
    "zipvl:attention=dense,retention_rate=0.5",
    "zipvl:attention=dense,tau=0.7",
    "tgv_kv:retention_rate=0.5",
    "mixkv:window=3,retention_rate=0.4",
    "expected_attention:retention_rate=0.4",
    "prompt_queries:retention_rate=0.4",
    "uniform:retention_rate=0.4,image_quota=per_image,score_pool=3,exempt_layers=-1",
)


def kept(report: plphp.PruneReport) -> list[Any]:
    return [
        (layer.layer, row.kept_positions, row.evicted_text) for layer in report.prompts[0].layers for row in layer.rows
    ]


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("prefill", PREFILL)
@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_a_chain_is_masking_inside_prefill_and_eviction_behind_it(family: str, prefill: str, kv: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 1])
    output, report = pruned(model, inputs, PLPHPConfig.parse(f"{prefill}+{kv}"))
    _, inside = pruned(model, inputs, PLPHPConfig.parse(prefill))
    with evicted_entries_masked(model, report, left_inside=inside):
        assert_same_generation(generate(model, inputs), output)
    assert sum(len(row[1][0]) for row in kept(report)) < sum(len(row[1][0]) for row in kept(inside))


def test_the_later_method_counts_what_the_earlier_one_left() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2])
    first = PLPHPConfig.parse("fastv:layer=1,retention_rate=0.7")
    config = dataclasses.replace(PLPHPConfig.parse("uniform:retention_rate=0.5"), earlier=(first,))
    _, report = pruned(model, inputs, config)
    _, inside = pruned(model, inputs, first)
    for layer, before in zip(report.prompts[0].layers, inside.prompts[0].layers, strict=True):
        [row], [left] = layer.rows, before.rows
        rate = 1.0 if layer.layer == 0 else (3 * 0.7 - 1) / 2  # three layers, the first of them whole
        assert (left.rate, row.rate) == (pytest.approx(rate), pytest.approx(0.5 * rate))
        assert row.vision_tokens == left.vision_tokens
        for head, positions in enumerate(row.kept_positions):
            assert set(positions) <= set(left.kept_positions[head])
            assert len(positions) == int(0.5 * len(left.kept_positions[head]) + 0.5)


@pytest.mark.parametrize("kv", KV)
def test_an_earlier_method_that_leaves_all_changes_nothing(kv: str) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2, 1])
    alone, expected = pruned(model, inputs, PLPHPConfig.parse(kv))
    output, report = pruned(model, inputs, PLPHPConfig.parse(f"vtw:retention_rate=1.0+{kv}"))
    assert_same_generation(alone, output)
    assert kept(report) == kept(expected)


def test_a_later_method_that_keeps_all_changes_nothing() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2, 1])
    alone, expected = pruned(model, inputs, PLPHPConfig.parse(PREFILL[0]))
    output, report = pruned(model, inputs, PLPHPConfig.parse(f"{PREFILL[0]}+none"))
    assert_same_generation(alone, output)
    assert kept(report) == kept(expected)
    assert [row.rate for layer in report.prompts[0].layers for row in layer.rows] == [
        row.rate for layer in expected.prompts[0].layers for row in layer.rows
    ]


def test_a_chain_is_a_row_of_a_branch() -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2])
    chain = PLPHPConfig.parse(f"{PREFILL[0]}+uniform:retention_rate=0.5")
    branches = plphp.branch(model, inputs, [PLPHPConfig.parse("uniform:retention_rate=0.5"), chain])
    draft = torch.tensor([[5, 6, 7]])
    logits = model(input_ids=draft.expand(2, -1), **passed(branches.cache)).logits
    cache = plphp.PrunedCache.for_inputs(model, inputs, chain)
    with torch.no_grad():
        first = model(**inputs, **passed(cache)).logits[:, -1]
        alone = model(input_ids=draft, **passed(cache)).logits
    assert torch.allclose(branches.logits[1:], first, atol=1e-10)
    assert torch.allclose(logits[1:], alone, atol=1e-10)


@pytest.fixture
def encoder_method(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})
    stage = EncoderStage(lambda image, config: Chosen(torch.ones(len(image.features), dtype=torch.bool)))
    register_method(Method("before", "an example", "an example", encoder=stage, kv=KVStage(keep_all, per_head)))
    return "before"


def test_what_vllm_does_not_run_is_refused_by_name(encoder_method: str) -> None:
    with pytest.raises(
        UnsupportedFeatureError, match="'before' takes tokens out before the text model, which vLLM has no"
    ):
        chain_of(PLPHPConfig(method=encoder_method), 3).refuse_all_but(("kv",), "vLLM")
    with pytest.raises(UnsupportedFeatureError, match="'fastv' takes tokens out inside prefill, which vLLM has no"):
        chain_of(PLPHPConfig.parse("fastv:layer=1,retention_rate=0.7+plphp"), 3).refuse_all_but(("kv",), "vLLM")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform+plphp", "uniform and plphp both act at the kv stage, and a run has one method at each stage"),
        ("plphp+vtw", "vtw acts at the prefill stage, before plphp at the kv stage: name them in the order"),
        ("vtw+fastv:layer=1+plphp", "vtw and fastv both act at the prefill stage"),
        ("vtw:windw=3+plphp", "'windw', which is no option of the method 'vtw' either"),
        ("fastv:layer=1,retention_rate=0.1+plphp", "the least retention_rate is 0.3334"),
        ("fastv:layer=1,retention_rate=0.7++plphp", "Expected a method on both sides of each +"),
        ("+plphp", "Expected a method on both sides of each +"),
        ("plphp+", "Expected a method on both sides of each +"),
        ("vtv+plphp", "Unknown method 'vtv'. Did you mean 'vtw'?"),
    ],
)
def test_chains_that_cannot_be(text: str, message: str) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"))
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        plphp.PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(text))


def test_a_wrong_chain_is_refused_before_anything_runs() -> None:
    with (
        pytest.raises(ConfigError, match="both act at the kv stage"),
        plphp.prune(tiny_model("llava"), PLPHPConfig.parse("uniform+plphp")),
    ):
        pass
    with pytest.raises(ConfigError, match="both act at the kv stage"):
        make_variants(["uniform:retention_rate=0.5+plphp"], [0.4])
    with pytest.raises(ConfigError, match="'full' is no method and stands alone, got 'full\\+plphp'"):
        make_variants(["full+plphp"], [0.4])
    with pytest.raises(ConfigError, match="before plphp at the kv stage"):
        read_settings("plphp+vtw", None, None, None, None)


def test_a_method_without_a_stage_is_none() -> None:
    with pytest.raises(ConfigError, match="'empty' acts at no stage: give it one of encoder, prefill, attention, kv"):
        Method("empty", "an example", "an example")
