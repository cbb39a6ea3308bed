# SPDX-License-Identifier: Apache-2.0
"""Later turns on the same cache, with text alone and with a new image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_packed import entries_of
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import plphp
from invariants import assert_same_generation, evicted_entries_masked, generate
from plphp import PLPHPConfig, PrunedCache, SpanError
from plphp.engines.hf.cache_argument import cache_in, passed
from precision import assert_exact
from test_invariants import FAMILIES, config
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")


def two_turns(model: Any, family: str, cache: Any, with_image: bool, rows: tuple[int, ...]) -> tuple[Any, Any]:
    """Generate, then go on with the same cache."""
    inputs = TINY[family].inputs(model, rows)
    first = generate(model, inputs, **passed(cache))
    second = TINY[family].second_turn(model, inputs, first.sequences, with_image=with_image)
    return first, generate(model, second, **passed(cache))


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
    first = generate(model, inputs, **passed(cache))
    before = [(layer.prefix.keys.clone(), layer.prefix.counts[0]) for layer in cache.layers]
    generate(model, TINY["llava"].second_turn(model, inputs, first.sequences, with_image=True), **passed(cache))
    for (keys, counts), layer in zip(before, cache.layers, strict=True):
        for head, old in enumerate(keys.split(counts)):
            count, (new, _) = counts[head], entries_of(layer.prefix, 0, head)
            assert torch.equal(old, new[:count])
            assert new.shape[0] > count


def test_session_takes_up_the_cache_of_the_first_turn() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1, 1])
    with plphp.prune(model, config("plphp")) as run:
        first = generate(model, inputs)
        turn = TINY["llava"].second_turn(model, inputs, first.sequences, with_image=True)
        generate(model, turn, **passed(cache_in(first)))
        assert len(run.report.prompts) == 2
    with pytest.raises(plphp.CacheStateError, match="outside the session"), torch.no_grad():
        model(input_ids=first.sequences[:, -1:], **passed(cache_in(first)))


def test_second_turn_of_unequal_lengths_is_the_row_alone() -> None:
    """Padding in the middle of the conversation, kept apart by the mask over the tail."""
    model = tiny_model("llava")
    settings = config("plphp")
    rows = TINY["llava"].rows(model, [2, 1])
    inputs = TINY["llava"].inputs(model, [2, 1])
    new = [[5, 6, 7, 8, 9], [11, 12]]

    cache = PrunedCache.for_inputs(model, inputs, settings)
    first = generate(model, inputs, **passed(cache))
    padded = torch.tensor([[0] * (5 - len(ids)) + ids for ids in new])
    answer = torch.ones(2, 4, dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], answer, (padded > 0).long()], dim=1)
    ids = torch.cat([first.sequences, padded], dim=1)
    together = generate(model, {"input_ids": ids, "attention_mask": mask}, **passed(cache))

    for row, alone in enumerate(rows):
        cache = PrunedCache.for_inputs(model, alone, settings)
        first = generate(model, alone, **passed(cache))
        ids = torch.cat([first.sequences, torch.tensor([new[row]])], dim=1)
        single = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **passed(cache))
        for batched, one in zip(together.logits, single.logits, strict=True):
            assert_exact(batched[row], one[0])


def test_new_tokens_alone_with_a_mask_over_the_whole() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    outputs = []
    for whole in (True, False):
        cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
        first = generate(model, inputs, **passed(cache))
        turn = TINY["llava"].second_turn(model, inputs, first.sequences, with_image=True)
        if not whole:
            # The newest answer token is not in the cache yet.
            turn["input_ids"] = turn["input_ids"][:, cache.get_seq_length() :]
        outputs.append(generate(model, turn, **passed(cache)))
    assert all(torch.equal(a, b) for a, b in zip(outputs[0].logits, outputs[1].logits, strict=True))


def test_a_turn_that_adds_nothing_is_refused() -> None:
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
    generate(model, inputs, **passed(cache))
    with pytest.raises(SpanError, match="tokens already"):
        generate(model, inputs, **passed(cache))


MROPE = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "glm4v")


@pytest.mark.parametrize("family", MROPE)
def test_positions_of_later_images_are_counted_on(family: str) -> None:
    """Three turns, the second with a new image and without positions, with another prompt in between."""
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, [2, 1])
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(retention_rate=1.0))
    first = generate(model, inputs, **passed(cache))
    turn = tiny.second_turn(model, inputs, first.sequences, with_image=True)
    del turn["position_ids"]
    generate(model, tiny.inputs(model, [3]))
    second = generate(model, turn, **passed(cache))

    rows = tiny.whole(model, tiny.rows(model, [2, 1]), first.sequences, with_image=True)
    for row, whole in enumerate(rows):
        expected = generate(model, whole)
        for got, wanted in zip(second.logits, expected.logits, strict=True):
            assert_exact(got[row], wanted[0])

    generate(model, tiny.inputs(model, [3]))
    types = {"mm_token_type_ids": 0} if "mm_token_type_ids" in turn else {}
    third = third_turn(model, second.sequences, turn, types, cache)
    for row, whole in enumerate(rows):
        answer = second.sequences[row : row + 1, -4:]
        longer = torch.cat([whole["input_ids"], answer, NEW_TEXT], dim=1)
        more = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        if types:
            types_row = whole["mm_token_type_ids"]
            more["mm_token_type_ids"] = torch.nn.functional.pad(types_row, (0, longer.shape[1] - types_row.shape[1]))
        expected = generate(model, {**whole, **more})
        for got, wanted in zip(third.logits, expected.logits, strict=True):
            assert_exact(got[row], wanted[0])


NEW_TEXT = torch.tensor([[5, 6, 7, 8]])


def third_turn(model: Any, sequences: torch.Tensor, turn: dict[str, Any], types: dict[str, Any], cache: Any) -> Any:
    """Go on with text alone."""
    ids = torch.cat([sequences, NEW_TEXT.expand(len(sequences), -1)], dim=1)
    grown = ids.shape[1] - turn["attention_mask"].shape[1]
    inputs = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(turn["attention_mask"], (0, grown), value=1)}
    for name, value in types.items():
        inputs[name] = torch.nn.functional.pad(turn[name], (0, grown), value=value)
    return generate(model, inputs, **passed(cache))


@pytest.mark.parametrize("family", MROPE)
def test_text_turn_is_right_after_another_prompt(family: str) -> None:
    """Transformers keeps rope_deltas on the model; another prompt would spoil the next turn."""
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, [2, 1])
    results = []
    for interrupt in (False, True):
        cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
        first = generate(model, inputs, **passed(cache))
        if interrupt:
            generate(model, tiny.inputs(model, [3]))
        results.append(generate(model, tiny.second_turn(model, inputs, first.sequences), **passed(cache)))
    assert_same_generation(*results)


class OtherPrompt(BaseStreamer):
    """Runs another prompt on the same model in the middle of an answer, as another thread would."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs, self.calls = model, inputs, 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 3:
            generate(self.model, self.inputs)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("family", MROPE)
def test_another_prompt_in_the_middle_of_an_answer_spoils_no_later_turn(family: str) -> None:
    model, tiny = tiny_model(family), TINY[family]
    inputs, other = tiny.inputs(model, [2]), tiny.inputs(model, [3])
    results = []
    for streamer in (None, OtherPrompt(model, other)):
        cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
        first = generate(model, inputs, **passed(cache), streamer=streamer)
        results.append(generate(model, tiny.second_turn(model, inputs, first.sequences), **passed(cache)))
    assert_same_generation(*results)


@pytest.mark.parametrize("again", [False, True], ids=["new", "reset"])
@torch.no_grad()
def test_positions_of_a_first_turn_without_generate(again: bool) -> None:
    model, tiny = tiny_model("qwen2-vl"), TINY["qwen2-vl"]
    inputs = tiny.inputs(model, [2])
    results = []
    for direct in (False, True):
        cache = PrunedCache.for_inputs(model, tiny.inputs(model, [3]) if again else inputs, config("plphp"))
        if again:
            other = tiny.inputs(model, [3])
            answer = generate(model, other, **passed(cache)).sequences
            generate(model, tiny.second_turn(model, other, answer, with_image=True), **passed(cache))
            cache.reset()
            assert (cache.nbytes, cache.pruning_seconds, cache.records, cache.turn) == (0, 0.0, [], None)
            cache.plan(inputs)
        if direct:
            model(**inputs, **passed(cache))
            generate(model, tiny.inputs(model, [1]))
        else:
            generate(model, inputs, **passed(cache), max_new_tokens=1)
        turn = tiny.second_turn(model, inputs, inputs["input_ids"])
        results.append(generate(model, turn, **passed(cache)))
    assert_same_generation(*results)


def test_a_cache_of_beams_is_not_continued() -> None:
    model, tiny = tiny_model("llava"), TINY["llava"]
    inputs = tiny.inputs(model, [1])
    cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
    first = generate(model, inputs, **passed(cache), num_beams=2)
    with pytest.raises(plphp.UnsupportedFeatureError, match="beams that were running"):
        generate(model, tiny.second_turn(model, inputs, first.sequences), **passed(cache))


def test_a_turn_under_inference_mode_and_one_outside() -> None:
    model, tiny = tiny_model("llava"), TINY["llava"]
    inputs = tiny.inputs(model, [1])
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = PrunedCache.for_inputs(model, inputs, config("plphp"))
        with mode():
            first = generate(model, inputs, **passed(cache))
        turn = tiny.second_turn(model, inputs, first.sequences.clone())
        results.append(generate(model, turn, **passed(cache)))
    assert_same_generation(*results)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_turns_after_several_sequences_and_after_a_choice_of_rows(family: str) -> None:
    """Two sequences for each of two prompts; then one of them goes on alone."""
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, [1, 1])
    sampling = {"do_sample": True, "num_return_sequences": 2, "temperature": 1.5}
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(retention_rate=1.0))
    torch.manual_seed(3)
    first = generate(model, inputs, **passed(cache), **sampling)
    repeated = {k: v.repeat_interleave(2, 0) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    types = {k: v.repeat_interleave(2, 0) for k, v in inputs.items() if k.endswith("token_type_ids")}
    generate(model, tiny.inputs(model, [3]))
    second = generate(model, tiny.second_turn(model, {**repeated, **types}, first.sequences), **passed(cache)).sequences
    cache.batch_select_indices(torch.tensor([2]))
    mask = torch.cat([repeated["attention_mask"], torch.ones(4, second.shape[1] - inputs["input_ids"].shape[1])], 1)
    text = torch.tensor([[5, 6, 7]])
    ids = torch.cat([second[2:3], text], 1)
    whole_mask = torch.cat([mask[2:3], torch.ones(1, 3)], 1).long()
    grown = {k: torch.nn.functional.pad(v[2:3], (0, ids.shape[1] - v.shape[1])) for k, v in types.items()}
    third = generate(model, {"input_ids": ids, "attention_mask": whole_mask, **grown}, **passed(cache))

    row = tiny.rows(model, [1, 1])[1]
    answer = ids[:, inputs["input_ids"].shape[1] :]
    longer = torch.cat([row["input_ids"], answer], 1)
    whole = {**row, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    for name in types:
        whole[name] = torch.nn.functional.pad(row[name], (0, answer.shape[1]))
    expected = generate(model, whole)
    for got, wanted in zip(third.logits, expected.logits, strict=True):
        assert_exact(got[0], wanted[0])
