# SPDX-License-Identifier: Apache-2.0
"""Full keys and values are freed layer by layer during prefill, by the allocator's own account."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import prefill_memory as script
import pytest
from torch.multiprocessing.reductions import StorageWeakRef

from plphp.engines.hf.cache_argument import passed
from plphp.extend import register_method
from plphp.methods.registry import METHODS_BY_NAME

SETTINGS = argparse.Namespace(layers=6, hidden=128, heads=4, kv_heads=4, images=2, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    model, inputs = script.build_model(SETTINGS), script.build_inputs(SETTINGS)
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(script.mark_layer)
    script.measure(model, inputs, lambda: None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(METHODS_BY_NAME, "registered", {})
        register_method(script.HELD)
        return {name: script.measure(model, inputs, make) for name, make in script.variants(model, inputs).items()}


def growth(result: dict[str, Any]) -> list[int]:
    """Live bytes that each layer but the first adds; what the first allocates besides has a moment to pass."""
    after = result["after_layer"]
    return [later - earlier for earlier, later in itertools.pairwise(after[1:])]


def test_dynamic_cache_grows_by_a_full_layer(results: dict[str, Any]) -> None:
    one = results["DynamicCache"]
    assert growth(one) == one["layer_bytes"][2:]


@pytest.mark.parametrize("rate", [0.4, 0.2])
def test_only_kept_entries_stay_when_a_layer_is_done(results: dict[str, Any], rate: float) -> None:
    one, full = results[f"plphp uniform {rate}"], results["DynamicCache"]["layer_bytes"][0]
    # Beside the entries only the record of what was kept stays, one byte per token and head.
    for grown, kept in zip(growth(one), one["layer_bytes"][2:], strict=True):
        assert kept <= grown <= kept + full / 100
    assert one["kv_bytes"] < (rate + 0.1) * results["DynamicCache"]["kv_bytes"]


@pytest.mark.parametrize("rate", [0.4, 0.2])
def test_peak_is_one_full_layer_and_the_pruned_ones(results: dict[str, Any], rate: float) -> None:
    # Without a cache the peak holds the keys and values of the layer at work.
    activations = results["no cache (activations alone)"]["peak"]
    one = results[f"plphp uniform {rate}"]
    assert one["peak"] <= activations + 1.05 * one["kv_bytes"]
    assert one["peak"] < results["DynamicCache"]["peak"]


def test_a_layer_in_few_bits_is_all_that_stays_of_it(results: dict[str, Any]) -> None:
    one, full = results["plphp 3 bits"], results["DynamicCache"]["layer_bytes"][0]
    for grown, held in zip(growth(one), one["layer_bytes"][2:], strict=True):
        assert held <= grown <= held + full / 100
    assert one["kv_bytes"] < 0.2 * results["DynamicCache"]["kv_bytes"]
    # The work on a layer takes copies of it, in float32 and as codes of an integer each, which are gone with it.
    assert one["peak"] <= results["no cache (activations alone)"]["peak"] + one["kv_bytes"] + 6 * full


def test_target_retention_holds_no_more_than_the_final_cache_and_the_layer_at_work(results: dict[str, Any]) -> None:
    one, activations = results["plphp target 0.4"], results["no cache (activations alone)"]
    assert one["peak"] <= activations["peak"] + 1.05 * one["kv_bytes"]
    for after, bare in zip(one["after_layer"][1:], activations["after_layer"][1:], strict=True):
        assert after - bare <= 1.05 * one["kv_bytes"]
    assert len(set(one["layer_bytes"])) == 3  # the classes


def test_without_a_bound_all_layers_are_held_until_the_last(results: dict[str, Any]) -> None:
    one, full = results["plphp target 0.4, all layers held"], results["DynamicCache"]
    assert one["peak"] > full["peak"] - 2 * full["layer_bytes"][0]
    assert one["layer_bytes"] == results["plphp target 0.4"]["layer_bytes"]


def test_nothing_outlives_the_cache() -> None:
    from invariants import generate
    from plphp import PLPHPConfig, PrunedCache
    from tiny_models import TINY, tiny_model

    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig())
    generate(model, inputs, **passed(cache))
    pointers = StorageWeakRef(cache.layers[0].prefix.keys.untyped_storage())
    assert not pointers.expired()
    del cache
    assert pointers.expired()
