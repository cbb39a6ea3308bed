# SPDX-License-Identifier: Apache-2.0
"""Frames that arrive without a question, given to the model itself, as many as there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memory_chat import answer, next_turn, vision_bytes
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from precision import assert_exact
from tiny_models import TIERS, tiers_model

pytestmark = pytest.mark.usefixtures("float64")

FRAMES = 12


def watched(model: Any, tiny: Any, config: str, frames: int = FRAMES, at_once: int = 1) -> tuple[PrunedCache, Any]:
    """A cache that has read some frames, and the inputs of the last; what it holds of them stays below the budget."""
    inputs = tiny.inputs(model, (at_once,))
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(config))
    for number in range(frames):
        if number:
            inputs = next_turn(model, tiny, inputs, inputs["input_ids"], seed=number)
        with torch.no_grad():
            model(**cache.model_inputs(cache.plan(inputs)), **passed(cache))
        assert 0 < vision_bytes(cache) <= cache.image_bytes.budget
        assert vision_bytes(cache) == cache.image_bytes.held
    return cache, inputs


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_as_many_frames_as_there_are(family: str) -> None:
    model, tiny = tiers_model(family), TIERS[family]
    cache, inputs = watched(model, tiny, "none:vision_budget=24 tokens")
    assert [image.turn for image in cache.images] == list(range(1, FRAMES + 1))
    asked = next_turn(model, tiny, inputs, inputs["input_ids"], seed=40, with_image=False)
    assert answer(model, cache, asked).sequences.shape[1] == asked["input_ids"].shape[1] + 3
    assert max(image.attention for image in cache.images) > 0


def test_several_frames_a_turn() -> None:
    cache, _ = watched(tiers_model("llava"), TIERS["llava"], "quantized:vision_budget=24 tokens", 4, at_once=3)
    assert [image.turn for image in cache.images] == [1, 1, 1, 2, 3, 4]


def test_frame_by_frame_is_as_all_at_once() -> None:
    """Under a budget that does not bind, the logits behind the last frame are those of one prompt with all of them."""
    model, tiny = tiers_model("llava"), TIERS["llava"]
    cache, inputs = watched(model, tiny, "none:vision_budget=1GB", 4)
    asked = next_turn(model, tiny, inputs, inputs["input_ids"], seed=40, with_image=False)
    frames = [tiny.inputs(model, (1,))]
    for number in range(1, 4):
        frames.append(next_turn(model, tiny, frames[-1], frames[-1]["input_ids"], seed=number))
    pixels = torch.cat([frame["pixel_values"] for frame in frames])
    with torch.no_grad():
        expected = model(**{**asked, "pixel_values": pixels}).logits[:, -1]
        assert_exact(model(**cache.model_inputs(cache.plan(asked)), **passed(cache)).logits[:, -1], expected)
