# SPDX-License-Identifier: Apache-2.0
"""Kinds of prompts: video, text alone, a prompt that ends in an image, one vision token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import plphp
from invariants import assert_same_generation, evicted_entries_masked, generate, pruned
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import cache_in, passed
from test_invariants import FAMILIES, config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

VIDEO = [family for family in FAMILIES if TINY[family].videos is not None]


def assert_exact(model: Any, inputs: dict[str, Any]) -> plphp.PruneReport:
    """Stock generate with everything kept, the masked reference with most evicted."""
    full, _ = pruned(model, inputs, PLPHPConfig(retention_rate=1.0))
    assert_same_generation(generate(model, inputs), full)
    output, report = pruned(model, inputs, config("plphp", retention_rate=0.3))
    with evicted_entries_masked(model, report):
        assert_same_generation(generate(model, inputs), output)
    return report


@pytest.mark.parametrize("rows", [[1], [1, 0, 2]], ids=str)
@pytest.mark.parametrize("family", VIDEO)
def test_video(family: str, rows: list[int]) -> None:
    model = tiny_model(family)
    report = assert_exact(model, TINY[family].inputs(model, rows, video=True))
    assert report.retention < 0.8
    tokens = [row.vision_tokens for row in report.prompts[0].layers[0].rows]
    assert [count > 0 for count in tokens] == [count > 0 for count in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_that_ends_in_an_image(family: str) -> None:
    model = tiny_model(family)
    assert assert_exact(model, TINY[family].inputs(model, [1, 2], text=(5, 0))).retention < 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_a_no_op(family: str) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [0, 0])
    output, report = pruned(model, inputs, config("plphp", retention_rate=0.2))
    stock = generate(model, inputs, **passed(DynamicCache(config=model.config.get_text_config())))
    assert_same_generation(stock, output)
    assert (report.prompts, report.retention) == ([], 1.0)
    layers = [layer for layer in cache_in(output).layers if hasattr(layer, "prefix")]
    assert layers
    assert all(layer.prefix is None for layer in layers)


@pytest.mark.parametrize("method", ["plphp", "random"])
def test_one_vision_token(method: str) -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    vision = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    vision[0, 9] = True
    cache = PrunedCache.for_inputs(model, inputs, config(method, retention_rate=0.1), vision_mask=vision)
    output = generate(model, inputs, **passed(cache))
    assert [row.kept for layer in cache.report().prompts[0].layers for row in layer.rows] == [[1, 1]] * 3
    assert_same_generation(generate(model, inputs), output)


@pytest.mark.parametrize("family", [name for name in FAMILIES if TINY[name].stock.chunked_prefill])
def test_generate_with_chunked_prefill(family: str) -> None:
    model, inputs = tiny_model(family), TINY[family].inputs(tiny_model(family), [2, 1])
    whole, one = pruned(model, inputs, config("plphp"))
    chunks, other = pruned(model, inputs, config("plphp"), prefill_chunk_size=7)
    assert_same_generation(whole, chunks)
    kept = [[layer.rows[0].kept_positions for layer in report.prompts[0].layers] for report in (one, other)]
    assert kept[0] == kept[1]
