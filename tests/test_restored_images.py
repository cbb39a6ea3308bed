# SPDX-License-Identifier: Apache-2.0
"""Images that come back: which features are taken for theirs, how they are ranked, and what the budget says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import plphp
from memory_chat import answer, converse, next_turn, vision_bytes
from plphp.families.registry import family_of
from tiny_models import TIERS, tiers_model


@pytest.mark.parametrize("family", ["qwen2-vl", "llava-next"])
def test_other_pixels_in_another_dtype_are_another_image_whatever_the_grid(family: str) -> None:
    model, tiny = tiers_model(family), TIERS[family]
    inputs = tiny.inputs(model, (1,))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=1GB"))
    answer(model, cache, inputs)
    [kind] = [own for own in family_of(tiny.config()).features if inputs.get(own.pixels[0]) is not None]
    own: dict[str, Any] = kind.items(inputs)[0]
    for pixels in (own["pixel_values"].flip(0).half(), own["pixel_values"].half()):
        with pytest.raises(plphp.HistoryError, match="have another dtype"):
            cache.restore(0, **{**own, "pixel_values": pixels})
    cache.restore(0, **own)


@pytest.mark.parametrize("method", ["vtw", "pyramiddrop"])
def test_images_that_left_before_a_layer_come_back_where_they_were(method: str) -> None:
    line = f"{method}+none:vision_budget=1GB,tier_device=cpu"
    cache = converse(tiers_model("llava"), TIERS["llava"], line, 1, rows=(4,)).cache
    before = [image.entries for image in cache.images]
    for number in range(4):
        cache.forget(number)
        cache.restore(number)
    assert [image.entries for image in cache.images] == before


def test_images_can_be_restored_any_number_of_times() -> None:
    cache = converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=5000,tier_device=cpu", 3).cache
    for number in range(150):
        cache.restore(number % 2)
        held = [image.nbytes for image in cache.images]
        assert held[number % 2] == max(held)
    for layer in cache.layers:
        for labels in (layer.ledger.whole, *layer.ledger.coded):
            assert bool(labels.score.isfinite().all())


def test_rows_that_share_entries_stay_below_the_budget_when_an_image_is_forgotten() -> None:
    cache = copy.deepcopy(converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=9000", 3).cache)
    cache.batch_repeat_interleave(4)
    cache.forget(0)
    assert cache.images[0].nbytes == 0
    assert 0 < vision_bytes(cache) <= 9000
    assert torch.equal(torch.tensor([image.row for image in cache.images[:4]]), torch.arange(4))


def test_a_restored_image_fades_like_the_newest_when_others_come() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    chat = converse(model, tiny, "none:vision_budget=12000,tier_device=cpu", 3)
    cache, inputs, output = chat.cache, chat.inputs, chat.outputs[-1]
    cache.restore(0)
    assert cache.images[0].nbytes == max(image.nbytes for image in cache.images)
    for turn in range(4):
        inputs = next_turn(model, tiny, inputs, output.sequences, seed=10 + turn)
        output = answer(model, cache, inputs)
    held = [image.nbytes for image in cache.images]
    assert 0 < held[0] < 1.3 * max(held[1:])


def test_features_are_compared_where_images_wait_in_host_memory() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    cache = converse(model, tiny, "none:vision_budget=1GB,tier_device=cpu", 2).cache
    own = tiny.inputs(model, (1,))["pixel_values"]
    cache.restore(0, pixel_values=own)
    with pytest.raises(plphp.HistoryError, match="is not among the 1 whose features"):
        cache.restore(1, pixel_values=own)
