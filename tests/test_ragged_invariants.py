# SPDX-License-Identifier: Apache-2.0
"""The invariants with KV heads of a layer that hold different numbers of entries."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import plphp
from invariants import (
    assert_padded_rows_are_the_rows_alone,
    assert_same_generation,
    attention_by_layer,
    evicted_entries_masked,
    generate,
    live_bytes,
    pruned,
    two_turns,
)
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from precision import EXACT, assert_exact
from test_invariants import FAMILIES, KINDS, METHODS, config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

COMPETING = tuple(name for name in METHODS if plphp.available_methods()[name].kv.heads_compare and name != "none")
PAIRS = [(family, method) for family in FAMILIES for method in COMPETING if method == "plphp" or family in KINDS]


def ragged(method: str, **values: Any) -> PLPHPConfig:
    """A config of the tiny models with ragged heads, which nothing but the layer's places holds together."""
    return config(method, heads="ragged", head_safeguard=0.0, min_kept=0, **values)


def several_heads(family: str) -> bool:
    """Whether layers of a tiny model have more than one KV head, without which there is nothing to share out."""
    return tiny_model(family).config.get_text_config().num_key_value_heads > 1


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_compacted_cache_is_the_full_cache_with_evicted_entries_masked(family: str, method: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    output, report = pruned(model, inputs, ragged(method, retention_rate=0.3))
    with evicted_entries_masked(model, report):
        reference = generate(model, inputs)
    assert_same_generation(reference, output)
    rows = [row for layer in report.prompts[0].layers for row in layer.rows if row.vision_tokens]
    if several_heads(family):
        assert any(len(set(row.kept)) > 1 for row in rows)
    _, equal = pruned(
        model,
        inputs,
        dataclasses.replace(
            ragged(method, retention_rate=0.3), heads="equal", head_safeguard=PLPHPConfig.head_safeguard
        ),
    )
    assert report.kv_bytes == equal.kv_bytes


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_padded_row_is_the_row_alone(family: str, method: str) -> None:
    if (family, method) == ("gemma4", "value_norm"):
        pytest.skip("the model normalises its values, so that float error ranks them")
    assert_padded_rows_are_the_rows_alone(tiny_model(family), TINY[family], ragged(method, retention_rate=0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_entries_are_the_top_scores_of_the_layer(family: str) -> None:
    """With no safeguard no evicted entry of any head scores higher than a kept entry of another."""
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 0, 1])
    attentions, kv_heads = attention_by_layer(model, inputs), model.config.get_text_config().num_key_value_heads
    _, report = pruned(model, inputs, ragged("plphp", retention_rate=0.4))
    [prompt] = report.prompts
    for layer in prompt.layers:
        grouped = attentions[layer.layer].unflatten(1, (kv_heads, -1)).mean(2)
        for number, row in enumerate(layer.rows):
            vision = [position for image in prompt.images[number] for position in image.positions]
            if not vision:
                continue
            kept = torch.zeros(len(grouped[number]), grouped.shape[-1], dtype=torch.bool)
            for head, positions in enumerate(row.kept_positions):
                kept[head, positions] = True
            kept = kept[:, vision]
            score = grouped[number][:, vision]
            assert int(kept.sum()) == int(row.rate * len(vision) + 0.5) * len(kept)
            if kept.any() and not kept.all():
                assert score[kept].min() >= score[~kept].max() - EXACT


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("family", KINDS)
def test_a_second_turn_reads_ragged_heads(family: str, with_image: bool) -> None:
    """Behind them comes a chunk of text, or a new image that is scored with them in the softmax."""
    model, tiny = tiny_model(family), TINY[family]
    if with_image and not tiny.stock.second_turn_image:
        pytest.skip("stock generate gives wrong answers here, or none")
    cache = PrunedCache.for_inputs(model, tiny.inputs(model, (2, 1)), ragged("plphp", retention_rate=0.3))
    first, second = two_turns(model, tiny, cache, with_image, (2, 1))
    report = cache.report()
    assert len(report.prompts) == 1 + with_image
    with evicted_entries_masked(model, report):
        stock = DynamicCache(config=model.config.get_text_config())
        expected_first, expected = two_turns(model, tiny, stock, with_image, (2, 1))
    assert_same_generation(expected_first, first)
    assert_same_generation(expected, second)


@pytest.mark.parametrize("family", KINDS)
def test_beams_read_ragged_heads(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 1])
    beams, report = pruned(model, inputs, ragged("plphp", retention_rate=0.4), num_beams=2)
    assert {len(layer.rows) for layer in report.prompts[0].layers} == {4}
    with evicted_entries_masked(model, report):
        assert torch.equal(generate(model, inputs, num_beams=2).sequences, beams.sequences)


@pytest.mark.parametrize("chunks", [2, 3])
def test_a_prompt_in_chunks_is_the_prompt_at_once(chunks: int) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2])
    settings = ragged("plphp", retention_rate=0.4)
    whole = PrunedCache.for_inputs(model, inputs, settings)
    expected = model(**inputs, **passed(whole), use_cache=True).logits[:, -1]
    cache = PrunedCache.for_inputs(model, inputs, settings)
    embeds = model.get_input_embeddings()(inputs["input_ids"].clamp(min=0))
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    embeds[inputs["input_ids"] == model.config.image_token_id] = features.to(embeds.dtype)
    for part in embeds.chunk(chunks, dim=1):
        logits = model(inputs_embeds=part, **passed(cache), use_cache=True).logits[:, -1]
    assert_exact(logits, expected)
    for ours, theirs in zip(cache.report().prompts[0].layers, whole.report().prompts[0].layers, strict=True):
        assert ours.rows[0].kept_positions == theirs.rows[0].kept_positions


@pytest.mark.parametrize("family", KINDS)
def test_bytes_of_the_report_are_those_of_the_live_tensors(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [3, 1])
    cache = PrunedCache.for_inputs(model, inputs, ragged("plphp", retention_rate=0.5))
    generate(model, inputs, **passed(cache))
    if "linear_attention" not in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        assert cache.report().kv_bytes == live_bytes(cache)
