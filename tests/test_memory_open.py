# SPDX-License-Identifier: Apache-2.0
"""What the memory of a conversation is to do and does not yet: each of these tests fails."""

from __future__ import annotations

import pytest
import torch

import plphp
from memory_chat import answer, converse, next_turn, vision_bytes
from plphp.engines.hf.cache_argument import cache_in, passed
from tiny_models import TEXT_IDS, TIERS, tiers_model


def test_records_grow_with_the_conversation_and_not_with_its_square() -> None:
    cache = converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=20000", 12).cache
    spans = {id(record.spans): record.spans.segment.nbytes for record in cache.records}
    assert sum(spans.values()) <= 2 * 8 * cache.get_seq_length()


def test_the_report_counts_means_of_prompts_that_need_none() -> None:
    line = "quantized:tiers=kivi2,vision_budget=1GB"
    cache = converse(tiers_model("llava"), TIERS["llava"], line, 2, rows=(2,)).cache
    cache.forget(1)
    assert cache.report().vision_bytes == pytest.approx(vision_bytes(cache), abs=3)


def test_a_row_without_new_images_does_not_end_the_batch() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (1, 1))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=4000"))
    output = answer(model, cache, inputs)
    for turn in range(1, 20):
        [new] = tiny.new_parts(model, 1, True, turn)
        text = torch.full_like(new["input_ids"], min(TEXT_IDS))
        ids = torch.cat([output.sequences, torch.cat([new["input_ids"], text])], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": new["pixel_values"]}
        cache_mask = cache.history.valid
        inputs["attention_mask"][:, : cache_mask.shape[1]] = cache_mask.long()
        output = answer(model, cache, inputs)
    assert vision_bytes(cache) <= 4000


def test_a_wider_dtype_leaves_whole_entries_below_the_budget() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (1,))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=5000"))
    with torch.autocast("cpu", torch.bfloat16):
        output = answer(model, cache, inputs)
    answer(model, cache, next_turn(model, tiny, inputs, output.sequences, with_image=False))
    assert vision_bytes(cache) <= 5000


def test_a_damaged_row_does_not_end_the_others_when_images_fade() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (1, 1))
    inputs["pixel_values"][0] = torch.nan
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=9000"))
    answer(model, cache, inputs)
    assert vision_bytes(cache) <= 9000
