# SPDX-License-Identifier: Apache-2.0
"""What the memory of a conversation is to do and does not yet: each of these tests fails."""

from __future__ import annotations

import pytest
import torch

import plphp
from memory_chat import answer, converse, next_turn, vision_bytes
from plphp.engines.hf.cache_argument import cache_in, passed
from tiny_models import TEXT_IDS, TIERS, tiers_model


def test_the_report_counts_means_of_prompts_that_need_none() -> None:
    line = "quantized:tiers=kivi2,vision_budget=1GB"
    cache = converse(tiers_model("llava"), TIERS["llava"], line, 2, rows=(2,)).cache
    cache.forget(1)
    assert cache.report().vision_bytes == pytest.approx(vision_bytes(cache), abs=3)


def test_a_wider_dtype_leaves_whole_entries_below_the_budget() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (1,))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=5000"))
    with torch.autocast("cpu", torch.bfloat16):
        output = answer(model, cache, inputs)
    answer(model, cache, next_turn(model, tiny, inputs, output.sequences, with_image=False))
    assert vision_bytes(cache) <= 5000
