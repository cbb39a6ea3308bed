# SPDX-License-Identifier: Apache-2.0
"""Later turns on the same cache, with text alone and with a new image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import plphp
from conftest import tiny_model
from invariants import assert_same_generation, evicted_entries_masked, generate
from plphp import PLPHPConfig, PrunedCache, SpanError
from test_invariants import FAMILIES, config
from tiny_models import TINY


def two_turns(model: Any, family: str, cache: Any, with_image: bool, rows: tuple[int, ...]) -> tuple[Any, Any]:
    """Generate, then go on with the same cache."""
    inputs = TINY[family].inputs(model, rows)
    first = generate(model, inputs, past_key_values=cache)
    second = TINY[family].second_turn(model, inputs, first.sequences, with_image=with_image)
    return first, generate(model, second, past_key_values=cache)


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn(family: str, with_image: bool) -> None:
    model = tiny_model(family)
    if with_image and not TINY[family].stock.second_turn_image:
        pytest.skip("stock generate gives wrong answers here, or none")
    rows = (2, 1)
    text = model.config.get_text_config()

    cache = PrunedCache.for_inputs(model, TINY[family].inputs(model, rows), PLPHPConfig(retention_rate=1.0))
    _, kept = two_turns(model, family, cache, with_image, rows)
    _, stock = two_turns(model, family, DynamicCache(config=text), with_image, rows)
    assert_same_generation(stock, kept)

    cache = PrunedCache.for_inputs(model, TINY[family].inputs(model, rows), config("plphp", retention_rate=0.3))
    first, second = two_turns(model, family, cache, with_image, rows)
    report = cache.report()
    assert len(report.prompts) == 1 + with_image
    with evicted_entries_masked(model, report):
        expected_first, expected = two_turns(model, family, DynamicCache(config=text), with_image, rows)
    assert_same_generation(expected_first, first)
    assert_same_generation(expected, second)


def test_old_vision_tokens_are_left_alone_by_a_new_image() -> None:
    model = tiny_model("llava")
    cache = PrunedCache.for_inputs(model, TINY["llava"].inputs(model, [2]), config("plphp"))
    inputs = TINY["llava"].inputs(model, [2])
    first = generate(model, inputs, past_key_values=cache)
    before = [(layer.prefix.keys.clone(), layer.prefix.counts[0]) for layer in cache.layers]
    generate(model, TINY["llava"].second_turn(model, inputs, first.sequences, with_image=True), past_key_values=cache)
    for (keys, counts), layer in zip(before, cache.layers, strict=True):
        heads = zip(keys.split(counts), layer.prefix._heads(0), strict=True)
        for count, (old, (new, _)) in zip(counts, heads, strict=True):
            assert torch.equal(old, new[:count])
            assert new.shape[0] > count


def test_session_takes_up_the_cache_of_the_first_turn() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1, 1])
    with plphp.prune(model, config("plphp")) as run:
        first = generate(model, inputs)
        turn = TINY["llava"].second_turn(model, inputs, first.sequences, with_image=True)
        generate(model, turn, past_key_values=first.past_key_values)
        assert len(run.report.prompts) == 2
    with pytest.raises(plphp.CacheStateError, match="outside the session"), torch.no_grad():
        model(input_ids=first.sequences[:, -1:], past_key_values=first.past_key_values)


def test_second_turn_of_unequal_lengths_is_the_row_alone() -> None:
    """Padding in the middle of the conversation, kept apart by the mask over the tail."""
    model = tiny_model("llava")
    settings = config("plphp")
    rows = TINY["llava"].rows(model, [2, 1])
    inputs = TINY["llava"].inputs(model, [2, 1])
    new = [[5, 6, 7, 8, 9], [11, 12]]

    cache = PrunedCache.for_inputs(model, inputs, settings)
    first = generate(model, inputs, past_key_values=cache)
    padded = torch.tensor([[0] * (5 - len(ids)) + ids for ids in new])
    answer = torch.ones(2, 4, dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], answer, (padded > 0).long()], dim=1)
    ids = torch.cat([first.sequences, padded], dim=1)
    together = generate(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)

    for row, alone in enumerate(rows):
        cache = PrunedCache.for_inputs(model, alone, settings)
        first = generate(model, alone, past_key_values=cache)
        ids = torch.cat([first.sequences, torch.tensor([new[row]])], dim=1)
        single = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache)
        for batched, one in zip(together.logits, single.logits, strict=True):
            assert (batched[row] - one[0]).abs().max() < 2e-5


def test_new_tokens_alone_with_a_mask_over_the_whole() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    outputs = []
    for whole in (True, False):
        cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
        first = generate(model, inputs, past_key_values=cache)
        turn = TINY["llava"].second_turn(model, inputs, first.sequences, with_image=True)
        if not whole:
            # The newest answer token is not in the cache yet.
            turn["input_ids"] = turn["input_ids"][:, cache.get_seq_length() :]
        outputs.append(generate(model, turn, past_key_values=cache))
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].logits, outputs[1].logits, strict=True))


def test_a_turn_that_adds_nothing_is_refused() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
    generate(model, inputs, past_key_values=cache)
    with pytest.raises(SpanError, match="holds .* tokens already"):
        generate(model, inputs, past_key_values=cache)
