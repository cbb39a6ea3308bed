# SPDX-License-Identifier: Apache-2.0
"""What a `PrunedCache` says about itself."""

from __future__ import annotations

import pytest
from torch import Tensor
from transformers import DynamicCache

from conftest import tiny_model
from invariants import generate, live_bytes
from plphp import PLPHPConfig, PrunedCache
from tiny_models import TINY


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3.5"])
def test_bytes_are_those_of_all_live_tensors_the_states_of_linear_attention_too(family: str) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [2, 1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig())
    generate(model, inputs, past_key_values=cache)
    stock = DynamicCache(config=model.config.get_text_config())
    generate(model, inputs, past_key_values=stock)
    states = 0
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, {}).values()
            states += sum(one.untyped_storage().nbytes() for one in held if isinstance(one, Tensor))
    assert (states > 0) == (family == "qwen3.5")
    assert cache.nbytes == live_bytes(cache) + states
    assert cache.full_nbytes == live_bytes(stock) + states
