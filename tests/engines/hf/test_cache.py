# SPDX-License-Identifier: Apache-2.0
"""What a `PrunedCache` says about itself."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from invariants import (
    assert_kept_are_top,
    assert_same_generation,
    attention_by_layer,
    evicted_entries_masked,
    generate,
    live_bytes,
    pruned,
)
from plphp import PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf.cache_argument import passed
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3.5"])
def test_bytes_are_those_of_all_live_tensors_the_states_of_linear_attention_too(family: str) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [2, 1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig())
    generate(model, inputs, **passed(cache))
    stock = DynamicCache(config=model.config.get_text_config())
    generate(model, inputs, **passed(stock))
    states = 0
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, {}).values()
            states += sum(one.untyped_storage().nbytes() for one in held if isinstance(one, Tensor))
    assert (states > 0) == (family == "qwen3.5")
    assert cache.nbytes == live_bytes(cache) + states
    assert cache.full_nbytes == live_bytes(stock) + states


def test_exempt_layers_keep_everything_and_do_not_count_for_the_target() -> None:
    model = tiny_model("qwen3-vl")
    layers = model.config.get_text_config().num_hidden_layers
    inputs = TINY["qwen3-vl"].inputs(model, [2, 0])
    config = PLPHPConfig(target_retention=0.4, exempt_layers=(0, -1))
    _, report = pruned(model, inputs, config)
    (prompt,) = report.prompts
    rates = []
    for layer in prompt.layers:
        row, empty = layer.rows
        assert empty.layer_class == "no-vision"
        if layer.layer in (0, layers - 1):
            assert (row.layer_class, row.rate) == ("exempt", 1.0)
            assert row.kept == [row.vision_tokens] * len(row.kept)
        else:
            assert row.layer_class in ("attentive", "balanced", "indifferent")
            assert max(row.kept) < row.vision_tokens
            rates.append(row.rate)
    assert sum(rates) / len(rates) == pytest.approx(0.4)


def test_scores_and_decoding_use_the_scaling_of_the_model() -> None:
    model = TINY["llava"].build()
    for layer in model.get_decoder().layers:
        layer.self_attn.scaling = 0.9  # the default is 12 ** -0.5
    inputs = TINY["llava"].inputs(model, [2, 1])
    output, report = pruned(model, inputs, PLPHPConfig())
    with evicted_entries_masked(model, report):
        assert_same_generation(generate(model, inputs), output)
    assert_kept_are_top(report, attention_by_layer(model, inputs), 2)


def test_a_cache_is_copied_whole_or_not_at_all(llava: Any) -> None:
    cache = PrunedCache.for_inputs(llava, TINY["llava"].inputs(llava), PLPHPConfig(retention_rate=0.4))
    for attempt in (pickle.dumps, copy.copy, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(UnsupportedFeatureError, match=r"cannot be pickled.*copy\.deepcopy makes another"):
            attempt(cache)
    copied = copy.deepcopy(cache)
    assert copied.attachment is cache.attachment
    assert not {id(layer) for layer in copied.layers} & {id(layer) for layer in cache.layers}
