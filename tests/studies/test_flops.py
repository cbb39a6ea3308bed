# SPDX-License-Identifier: Apache-2.0
"""Operations counted from shapes alone against those of models with weights, over all families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.patch_ways import feature_arguments
from plphp.engines.hf.tower_layers import core_of
from plphp.errors import UnsupportedModelError
from plphp.families.registry import family_of
from plphp.studies.flops import counted_layers, tower_flops
from plphp.studies.model_cost import LayerCost, ModelCost, model_cost
from plphp.studies.schedule import Schedule
from tiny_models import TINY

NOT_KNOWN = {"gemma4", "idefics2"}
"""Families whose towers look at values."""
WITH_STATE = {"qwen3.5", "qwen3.5-moe", "lfm2-vl"}
"""Families some of whose layers have a recurrent state, whose products are left out."""
TOKENS = 5


def made(name: str, device: str) -> PreTrainedModel:
    """A model of its own, with attention whose products the counter sees."""
    family = TINY[name]
    with torch.device(device):
        model = getattr(transformers, family.model_class)._from_config(family.config())
    if device == "cpu":
        model.set_attn_implementation("eager")
    return model.eval().requires_grad_(False)


def counted_tower(model: PreTrainedModel, inputs: Any) -> int:
    total, core = 0, core_of(model)
    for features in family_of(model.config).features:
        if inputs.get(features.pixels[0]) is None:
            continue
        method = core.get_video_features if features.of_videos else core.get_image_features
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            method(inputs[features.pixels[0]], **feature_arguments(method, core.config, inputs))
        total += counter.get_total_flops()
    return total


@pytest.mark.parametrize("name", TINY)
def test_the_tower_without_weights_takes_what_it_takes_with_them(name: str) -> None:
    full, empty = made(name, "cpu"), made(name, "meta")
    inputs = TINY[name].inputs(full, [2])
    counted = tower_flops(empty, inputs)
    if name in NOT_KNOWN and counted is None:
        return
    assert counted == counted_tower(full, inputs) > 0


@pytest.mark.parametrize("name", sorted(set(TINY) - WITH_STATE))
def test_the_text_model_takes_what_its_layers_do(name: str) -> None:
    """Attention of a real pass computes all pairs of tokens; the bound counts those that a causal mask lets through."""
    full = made(name, "cpu")
    full.set_experts_implementation("batched_mm")
    cost = model_cost(made(name, "meta"))
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        full(input_ids=ids, logits_to_keep=1)
    by_hand = sum(TOKENS * layer.token_flops + TOKENS**2 * layer.pair_flops for layer in cost.layers)
    if name != "gemma4":  # projects per-layer inputs, once for all layers
        assert counter.get_total_flops() == by_hand + cost.head_flops
    masked = TOKENS * (TOKENS - 1) // 2 * sum(layer.pair_flops for layer in cost.layers)
    assert 0 < cost.prefill_flops(TOKENS, 0) <= by_hand + cost.head_flops - masked
    assert all(layer.token_flops > 0 and layer.pair_flops > 0 for layer in cost.layers)


@pytest.mark.parametrize("name", sorted(WITH_STATE))
def test_of_a_recurrent_state_the_weights_count(name: str) -> None:
    cost, model = model_cost(made(name, "meta")), made(name, "meta")
    layers = model.get_decoder().layers
    for layer, module in zip(cost.layers, layers, strict=True):
        assert layer.token_flops > 0
        if "moe" not in name:
            matrices = sum(2 * weight.numel() for weight in module.parameters() if weight.ndim == 2)
            assert layer.token_flops >= matrices
        assert (layer.pair_flops == 0) == (layer.kv_heads == 0)


def test_a_mixture_counts_the_experts_that_a_token_goes_to() -> None:
    cost, model = model_cost(made("qwen3-vl-moe", "meta")), made("qwen3-vl-moe", "meta")
    config = model.config.text_config
    layer = model.get_decoder().layers[0]
    experts = sum(2 * weight.numel() for weight in layer.mlp.experts.parameters())
    others = sum(2 * weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    assert config.num_experts_per_tok < config.num_experts
    assert cost.layers[0].token_flops == others + experts * config.num_experts_per_tok // config.num_experts


@pytest.mark.parametrize(("probe_rows", "random_rows"), [(64, 64), (4, 3)], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "gemma3"])
def test_attention_among_some_tokens_takes_what_a_run_does(
    name: str, probe_rows: int, random_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real pass, whose eager attention computes all pairs of what attends, with the logits of the probe rows."""
    model, cost = made(name, "cpu"), model_cost(made(name, "meta"))
    vision, text = 60, 20
    is_vision = torch.zeros(1, vision + text, dtype=torch.bool)
    is_vision[:, 10 : 10 + vision] = True
    embeddings = torch.randn(1, vision + text, model.config.get_text_config().hidden_size)
    inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones(1, vision + text, dtype=torch.long)}
    config = PLPHPConfig.parse(f"zipvl:retention_rate=0.5,query_rows={probe_rows},random_rows={random_rows}")
    cache = PrunedCache.for_inputs(model, inputs, config, vision_mask=is_vision)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, **passed(cache), logits_to_keep=1)
    monkeypatch.setattr("plphp.studies.model_cost.PROBE_ROWS", probe_rows + random_rows)
    monkeypatch.setattr("plphp.studies.model_cost._causal_pairs", lambda tokens: tokens**2)
    there = [vision] * len(cost.layers)
    attending = Schedule(attention=0.5).attending(there)
    assert attending == [vision // 2] * len(there)
    assert (
        cost.prefill_flops(text, vision, there, attending) + _windowed(cost, vision + text) == counter.get_total_flops()
    )


def _windowed(cost: ModelCost, tokens: int) -> int:
    """What a real pass computes of layers with a window beside what counts: pairs outside of the window."""
    pairs = [tokens**2 * layer.pair_flops for layer in cost.layers if layer.window is not None]
    counted = [layer.flops(tokens, tokens) - tokens * layer.token_flops for layer in cost.layers if layer.window]
    return sum(pairs) - sum(counted)


def test_the_pairs_of_a_window() -> None:
    whole, windowed = (LayerCost(1, window, 0, True, token_flops=10, pair_flops=3) for window in (None, 4))
    assert whole.flops(6, 6) == 60 + 21 * 3
    assert windowed.flops(8, 8) == 80 + 2 * 10 * 3  # two windows of four
    assert windowed.flops(5, 8) == 50 + (3 + 6) * 3
    assert windowed.flops(3, 3) == whole.flops(3, 3)


def test_layers_that_are_not_found_are_named() -> None:
    model = made("llava", "meta")
    with pytest.raises(UnsupportedModelError, match="no list of 7 decoder layers"), counted_layers(model, 7):
        pass
