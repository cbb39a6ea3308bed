# SPDX-License-Identifier: Apache-2.0
"""The invariants over families x methods."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import plphp
from invariants import (
    assert_kept_are_top,
    assert_padded_rows_are_the_rows_alone,
    assert_same_generation,
    attention_by_layer,
    evicted_entries_masked,
    generate,
    live_bytes,
    pruned,
)
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

FAMILIES = sorted(TINY)
STAGED = tuple(
    name for name, method in sorted(plphp.available_methods().items()) if method.kv is None and name != "g_search"
)
"""Methods that act before the KV cache alone, and are asked for a rate."""
MERGING = ("pool", "visionzip")
"""Those of them that change the features of what stays: tests/test_stage_invariants.py has a reference for them."""
METHODS = tuple(sorted(plphp.available_methods().keys() - {"oracle", "query_bank", "quantized", "g_search", *STAGED}))
"""Those that need nothing but a prompt and hold entries whole; tests/studies/test_query_bank.py has the invariants of
that method."""
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 4},
    "snapkv_vision": {"window": 4},
    "pyramidkv": {"window": 4},
    "adakv": {"window": 4},
    "mixkv": {"window": 4},
    "recall_rank": {"floor": 0.2, "random_share": 0.2, "value_norm": 1},
    "fastv": {"layer": 1},
    "zipvl": {"attention": "dense"},  # with important tokens: tests/engines/hf/test_attending.py
}
ROWS = ([1], [2], [2, 0, 1])


def config(method: str, **values: Any) -> PLPHPConfig:
    """A config whose thresholds the tiny models reach from both sides."""
    if method == "none":  # keeps everything, and takes no rate
        values = {name: value for name, value in values.items() if name not in ("retention_rate", "target_retention")}
    made = PLPHPConfig(method=method, options=OPTIONS.get(method, {}), **values)
    if made.sorts_by_order or not plphp.available_methods()[method].uses_class_rule(made):
        return made
    return dataclasses.replace(made, attentive_threshold=0.6, indifferent_threshold=0.5)


def full_attention_only(family: str) -> bool:
    """Whether all text layers of a tiny model have full attention."""
    return set(getattr(TINY[family].config().get_text_config(), "layer_types", None) or ["full_attention"]) == {
        "full_attention"
    }


FULL = [family for family in FAMILIES if full_attention_only(family)]

KINDS = ("llava", "qwen2-vl", "gemma3", "qwen3.5", "smolvlm")
"""Families that differ in what a method may touch: plain, with m-RoPE, with sliding windows, with linear attention, and
with many segments per image."""
MECHANISMS = ("plphp", "snapkv", "recall_rank", "expected_attention", "prompt_queries")
"""Methods that differ in what they ask of a family: rates by layer, evicted text, all kinds of evidence and draws,
turned queries as states, and those that ask."""


def pairs(mechanisms: tuple[str, ...] = MECHANISMS) -> list[tuple[str, str]]:
    """Every family with each mechanism, and every method with each kind of family.

    The whole product has nearly three times as many. What a method does with a family depends on the kind of the
    family alone, so that the rest would find nothing new.
    """
    return [(family, method) for family in FAMILIES for method in METHODS if method in mechanisms or family in KINDS]


def staged() -> list[tuple[str, str]]:
    """The same for the methods that act before the KV cache; tests/test_stage_invariants.py has more of them."""
    return [(family, method) for family in FULL for method in STAGED if method == "fastv" or family in KINDS]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_retention_is_stock_generate(family: str, rows: list[int]) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), rows)
    output, report = pruned(model, inputs, PLPHPConfig(retention_rate=1.0))
    assert_same_generation(generate(model, inputs), output)
    assert report.retention == 1.0


@pytest.mark.parametrize(("family", "method"), pairs())
def test_compacted_cache_is_full_cache_with_evicted_entries_masked(family: str, method: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    output, report = pruned(model, inputs, config(method, retention_rate=0.3))
    with evicted_entries_masked(model, report):
        reference = generate(model, inputs)
    assert_same_generation(reference, output)
    if method != "none":
        assert report.retention < 0.8
        # The masks do something: without them the logits are others.
        assert (generate(model, inputs).logits[-1] - output.logits[-1]).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "method"), [pair for pair in staged() if pair[1] not in MERGING])
def test_tokens_that_left_are_masked_in_prefill_too(family: str, method: str) -> None:
    """The prompt itself, and decoding after it; with padding, a row without images and unequal numbers of them."""
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    output, report = pruned(model, inputs, config(method, retention_rate=0.6))
    with evicted_entries_masked(model, report, inside_prefill=True):
        reference = generate(model, inputs)
    assert_same_generation(reference, output)
    assert report.retention < 0.8
    assert (generate(model, inputs).logits[0] - output.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "method"), [*pairs(), *staged()])
def test_padded_row_is_the_row_alone(family: str, method: str) -> None:
    if (family, method) == ("gemma4", "value_norm"):
        pytest.skip("the model normalises its values, so that float error ranks them")
    assert_padded_rows_are_the_rows_alone(tiny_model(family), TINY[family], config(method, retention_rate=0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_entries_are_the_top_scores(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    _, report = pruned(model, inputs, config("plphp"))
    kv_heads = model.config.get_text_config().num_key_value_heads
    assert_kept_are_top(report, attention_by_layer(model, inputs), kv_heads)
    assert {layer.layer for layer in report.prompts[0].layers} == set(pruned_layers(model))


def pruned_layers(model: Any) -> list[int]:
    """Full-attention layers, from the config."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]


@pytest.mark.parametrize(("family", "method"), [*pairs(("plphp",)), *staged()])
def test_bytes_of_the_report_are_the_bytes_of_the_live_tensors(family: str, method: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [3, 1])
    cache = PrunedCache.for_inputs(model, inputs, config(method, retention_rate=0.5))
    generate(model, inputs, **passed(cache))
    report = cache.report()
    stock = DynamicCache(config=model.config.get_text_config())
    generate(model, inputs, **passed(stock))
    if not any(stock.is_linear):
        assert report.kv_bytes == live_bytes(cache)
        assert report.kv_bytes_full == live_bytes(stock)
    entries = [cache.layers[i].prefix.keys.shape[0] for i in pruned_layers(model)]
    vision = [sum(sum(row.kept) for row in layer.rows) for layer in report.prompts[0].layers]
    evicted = [sum(len(head) for row in layer.rows for head in row.evicted_text) for layer in report.prompts[0].layers]
    text = int(inputs["attention_mask"].sum()) - sum(row.vision_tokens for row in report.prompts[0].layers[0].rows)
    kv_heads = model.config.get_text_config().num_key_value_heads
    assert entries == [kept + text * kv_heads - gone for kept, gone in zip(vision, evicted, strict=True)]
    assert bool(sum(evicted)) == (method in ("snapkv", "adakv"))


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_as_before_after_the_session(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family))
    attributes, weights = dict(model.__dict__), {k: v.clone() for k, v in model.state_dict().items()}
    implementations = [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
    before = generate(model, inputs)

    def fail_inside() -> None:
        with plphp.prune(model, PLPHPConfig()):
            generate(model, inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert model.__dict__.keys() == attributes.keys()
    assert [
        getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")
    ] == implementations
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    after = generate(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
