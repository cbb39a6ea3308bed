# SPDX-License-Identifier: Apache-2.0
"""Histories that differ from what a cache has read are refused with the place; what it was not told is not compared."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_graph import Recorder
from test_whole_chat import (
    KEPT,
    NOISE,
    PRUNED,
    assert_rows_alone,
    assert_same_generation,
    first_turn,
    model_of,
    only_new,
    whole,
)
from transformers import DynamicCache

import plphp
from invariants import generate
from plphp import HistoryError, PrunedCache, SpanError
from plphp.engines.hf import dispatch, generation
from plphp.engines.hf.cache_argument import cache_in, passed
from plphp.engines.hf.conversation.turns import new_features
from plphp.families.base import Family, Features, VisionSegment
from plphp.families.registry import FAMILIES_BY_NAME, family_of
from tiny_models import IMAGE, TINY


@pytest.mark.parametrize(
    ("turns", "place", "where"),
    [
        (2, 5, "in the prompt of turn 1"),
        (2, 20, "in the prompt of turn 1"),  # a vision token
        (1, -2, "in the answer of turn 1"),
        (2, -9, "in the prompt of turn 2"),
        (2, -2, "in the answer of turn 2"),
    ],
)
def test_a_history_that_differs_is_refused_with_its_place(turns: int, place: int, where: str) -> None:
    """In a batch of two; the cache is as before and goes on with the right conversation."""
    model, tiny, rows, cache, output = first_turn("qwen2-vl")
    rows = tiny.whole(model, rows, output.sequences, True)
    if turns == 2:
        output = generate(model, whole(rows), **passed(cache))
        rows = tiny.whole(model, rows, output.sequences, False, seed=2)
    inputs = whole(rows)
    expected = generate(model, inputs, **passed(copy.deepcopy(cache)))
    pads = int((1 - inputs["attention_mask"][1]).sum())
    assert pads
    position = pads + place if place > 0 else cache.get_seq_length() + place
    wrong = inputs["input_ids"].clone()
    wrong[1, position] = 77
    before, [here], after = inputs["input_ids"][1, position - 3 : position + 4].split([3, 1, 3])
    with pytest.raises(HistoryError, match=f"Row 1 .* at token {position}, {where}: .* Usual causes") as error:
        generate(model, {**inputs, "input_ids": wrong}, **passed(cache))
    before, after = (", ".join(map(str, tokens.tolist())) for tokens in (before, after))
    assert f"has read [{before}, *{here}*" in str(error.value)
    assert f"the conversation has [{before}, *77*, {after}]" in str(error.value)
    assert_same_generation(generate(model, inputs, **passed(cache)), expected)


def test_a_history_that_lost_a_part_is_refused_with_its_place() -> None:
    """As where a template leaves out the reasoning: what was sent is shorter than what the cache holds."""
    model, _, rows, cache, output = first_turn("llava", (1,), max_new_tokens=20)
    begin = rows[0]["input_ids"].shape[1]
    ids = torch.cat([output.sequences[:, : begin + 2], output.sequences[:, -3:], torch.tensor([[5, 6]])], 1)
    assert ids.shape[1] < cache.get_seq_length()
    with pytest.raises(HistoryError, match=f"at token {begin + 2}, in the answer of turn 1: .* reasoning"):
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **passed(cache))
    with pytest.raises(SpanError, match="tokens already"):
        generate(model, {"input_ids": output.sequences[:, :-1]}, **passed(cache))


def test_the_last_token_of_an_answer_is_not_in_the_cache() -> None:
    """It may be another one, as where a template closes an answer that was cut off."""
    model, tiny, rows, cache, output = first_turn("llava", (1,), KEPT)
    output.sequences[:, -1] = 77
    rows = tiny.whole(model, rows, output.sequences, True)
    assert_rows_alone(model, rows, generate(model, whole(rows), **passed(cache)))


def swapped(value: torch.Tensor) -> torch.Tensor:
    """The first two images in each other's place."""
    return torch.cat([value[1:2], value[:1], value[2:]])


@pytest.mark.parametrize("name", ["llava", "llava-pixtral", "idefics2", "qwen2-vl", "gemma4", "llava-next", "lfm2-vl"])
def test_an_image_that_is_not_the_one_that_was_read_is_refused(name: str) -> None:
    """One element of the second row's image is another one."""
    model, tiny, rows, cache, output = first_turn(name)
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    expected = generate(model, inputs, **passed(copy.deepcopy(cache)))
    pixels = inputs["pixel_values"].clone()
    number = 3  # three images of row 0 with the new one, so the fourth is the first one of row 1
    if name == "idefics2":
        pixels[1, 0, 0, 3, 3] += 0.01
    elif name == "qwen2-vl":
        pixels[int(inputs["image_grid_thw"][:3].prod(1).sum()) + 5, 7] += 0.01
    else:
        pixels[3].view(-1)[11] += 0.01
    with pytest.raises(HistoryError, match=f"Image {number} of pixel_values is not the one .* of row 1"):
        generate(model, {**inputs, "pixel_values": pixels}, **passed(cache))
    assert_same_generation(generate(model, inputs, **passed(cache)), expected)


def test_images_in_another_order_are_refused() -> None:
    model, tiny, rows, cache, output = first_turn("llava")
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    with pytest.raises(HistoryError, match=r"Image 0 of pixel_values is not the one .* order"):
        generate(model, {**inputs, "pixel_values": swapped(inputs["pixel_values"])}, **passed(cache))


def test_images_in_another_dtype_are_not_compared() -> None:
    model, tiny, rows, cache, output = first_turn("llava")
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    generate(model, {**inputs, "pixel_values": inputs["pixel_values"].float()}, **passed(cache))


@pytest.mark.parametrize("images", [1, 3])
def test_features_that_are_neither_all_nor_the_new_ones(images: int) -> None:
    model, tiny, rows, cache, output = first_turn("llava", (3,))
    inputs = whole(tiny.whole(model, rows, output.sequences, False))
    inputs["input_ids"][0, -4:-2] = IMAGE
    match = r"holds 2 vision tokens and the whole conversation 50, but the images fill " + str(16 * images)
    with pytest.raises(SpanError, match=match):
        generate(model, {**inputs, "pixel_values": inputs["pixel_values"][:images]}, **passed(cache))


def test_a_family_that_does_not_take_its_features_apart_takes_the_new_ones() -> None:
    model, tiny, rows, cache, output = first_turn("llava")
    before = whole(rows)
    rows = tiny.whole(model, rows, output.sequences, True)
    plphp.register_family(replace(family_of(model.config), name="whole-chat-test", features=()))
    try:
        with pytest.raises(SpanError, match="'whole-chat-test' is all that is understood"):
            generate(model, whole(rows), **passed(cache))
        generate(model, only_new(tiny, model, before, output, True, 1), **passed(cache))
    finally:
        del FAMILIES_BY_NAME.registered["whole-chat-test"]


def test_a_past_that_ends_inside_an_image_is_refused() -> None:
    family = Family(
        "toy",
        ("toy",),
        lambda config: (IMAGE,),
        lambda config, inputs: [VisionSegment(int(size)) for size in inputs["pixel_values"]],
        features=(Features(lambda config: (IMAGE,)),),
    )
    inputs = {"input_ids": torch.tensor([[5, *[IMAGE] * 3, 6, IMAGE, IMAGE, 7]]), "pixel_values": torch.tensor([3, 2])}
    with pytest.raises(SpanError, match=r"holds 3 tokens, .* image 0 of pixel_values \(tokens 1 to 3 of row 0\)"):
        new_features(family, plphp.PLPHPConfig, inputs, 3, 8)  # type: ignore[arg-type]
    for past, new in ((0, [3, 2]), (1, [3, 2]), (4, [2]), (5, [2]), (7, None)):
        narrowed, sent = new_features(family, plphp.PLPHPConfig, inputs, past, 8)  # type: ignore[arg-type]
        assert new == (narrowed["pixel_values"].tolist() if "pixel_values" in narrowed else None)
        assert [(image.first, image.last) for image in sent] == [(1, 3), (5, 6)]


# --- padding ----------------------------------------------------------------------------------------------


def test_a_batch_that_was_padded_anew_is_refused() -> None:
    """As a processor does where the answers of the rows are not equally long."""
    model, tiny, rows, cache, output = first_turn("llava")
    rows = tiny.whole(model, rows, output.sequences, True)
    shorter = {**rows[0], **{name: rows[0][name][:, :-2] for name in ("input_ids", "attention_mask")}}
    shifted = whole([shorter, rows[1]])
    match = r"Row 1 .* begins with 14 tokens of padding and was read with 16: .* on its left"
    with pytest.raises(HistoryError, match=match):
        generate(model, shifted, **passed(cache))


def test_padding_that_is_not_masked_any_more_is_refused() -> None:
    model, tiny, rows, cache, output = first_turn("llava")
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    padded = int((1 - inputs["attention_mask"][1]).sum())
    assert padded
    with pytest.raises(HistoryError, match=f"Row 1 .* begins with 0 tokens of padding and was read with {padded}"):
        generate(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, **passed(cache))
    hidden = inputs["attention_mask"].clone()
    hidden[0, 2] = 0
    with pytest.raises(HistoryError, match="Token 2 of row 0 is masked"):
        generate(model, {**inputs, "attention_mask": hidden}, **passed(cache))


def test_an_answer_that_ended_before_the_others_is_masked_in_the_next_turn() -> None:
    """What ``generate`` writes behind the end of a row is no part of its conversation."""
    model, tiny, rows, cache, output = first_turn("llava", config=KEPT)
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    begin = output.sequences.shape[1]
    inputs["attention_mask"][1, begin - 3 : begin] = 0
    inputs["input_ids"][1, begin - 3 : begin] = 0
    second = generate(model, inputs, **passed(cache))
    alone = tiny.whole(model, rows, output.sequences, True)[1]
    cut = alone["input_ids"].shape[1] - (inputs["input_ids"].shape[1] - begin)
    for name in ("input_ids", "attention_mask"):
        alone[name] = torch.cat([alone[name][:, : cut - 3], alone[name][:, cut:]], dim=1)
    expected = generate(model, alone)
    assert max(float((a[1] - b[0]).abs().max()) for a, b in zip(second.logits, expected.logits, strict=True)) < NOISE


# --- what is not known ------------------------------------------------------------------------------------


def changed(inputs: dict[str, Any], row: int, position: int) -> dict[str, Any]:
    """The inputs with another token at a place."""
    ids = inputs["input_ids"].clone()
    ids[row, position] = 77
    return {**inputs, "input_ids": ids}


def accepts(cache: PrunedCache, inputs: dict[str, Any]) -> bool:
    """Whether a cache would go on with a conversation; it stays as it is."""
    try:
        copy.deepcopy(cache).plan(inputs)
    except HistoryError:
        return False
    return True


@torch.no_grad()
def test_tokens_that_the_cache_was_not_told_are_not_compared() -> None:
    model, tiny = model_of("llava"), TINY["llava"]
    [row] = tiny.rows(model, [1])
    cache = PrunedCache.for_inputs(model, row, KEPT)
    model(**row, **passed(cache))
    length = cache.get_seq_length()
    model(input_ids=torch.tensor([[5, 6, 7]]), **passed(cache))
    ids = torch.cat([row["input_ids"], torch.tensor([[9, 9, 9, 9]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert accepts(cache, turn)
    assert not accepts(cache, changed(turn, 0, length - 1))
    cache.plan(turn)  # and what is read now is known behind them
    model(input_ids=ids[:, -1:], **passed(cache))
    longer = {name: torch.nn.functional.pad(value, (0, 1), value=1) for name, value in turn.items()}
    assert accepts(cache, changed(longer, 0, length + 1))
    assert not accepts(cache, changed(longer, 0, length + 3))


def test_a_prompt_of_embeddings_is_not_compared() -> None:
    model, tiny = model_of("llava"), TINY["llava"]
    [row] = tiny.rows(model, [1])
    embeds = model.get_input_embeddings()(row["input_ids"]).detach()
    mask = row["input_ids"] == IMAGE
    cache = PrunedCache.for_inputs(model, {"inputs_embeds": embeds}, PRUNED, vision_mask=mask)
    output = generate(model, {"inputs_embeds": embeds}, **passed(cache))
    ids = torch.cat([row["input_ids"], output.sequences, torch.tensor([[5]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = embeds.shape[1]
    assert accepts(cache, changed(turn, 0, 1))
    assert not accepts(cache, changed(turn, 0, length))
    assert not accepts(cache, changed(turn, 0, length + 2))
    assert accepts(cache, changed(turn, 0, length + 3))


def test_the_history_follows_the_rows() -> None:
    model, tiny, rows, cache, output = first_turn("llava", (1, 1))
    rows = tiny.whole(model, rows, output.sequences, True)
    inputs, turned = whole(rows), whole(rows[::-1])
    pads = int((1 - turned["attention_mask"]).sum())
    assert pads
    assert accepts(cache, inputs)
    for select in (
        lambda: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
    ):
        select()
        assert not accepts(cache, inputs)
        assert accepts(cache, turned)
        inputs, turned = turned, inputs
    cache.batch_select_indices(torch.tensor([False, True]))
    one = whole(rows[1:])
    pads = inputs["input_ids"].shape[1] - one["input_ids"].shape[1]
    one = {**one, **{n: torch.nn.functional.pad(one[n], (pads, 0)) for n in ("input_ids", "attention_mask")}}
    other = {**one, "pixel_values": swapped(one["pixel_values"])}
    assert accepts(cache, one)
    assert not accepts(cache, other)
    cache.batch_repeat_interleave(2)
    twice = {name: value.repeat_interleave(2, 0) for name, value in one.items()}
    twice["pixel_values"] = one["pixel_values"].repeat(2, 1, 1, 1)
    assert accepts(cache, twice)
    assert not accepts(cache, changed(twice, 1, pads + 3))
    wrong = {**twice, "pixel_values": torch.cat([one["pixel_values"], swapped(one["pixel_values"])])}
    assert not accepts(cache, wrong)


def test_the_history_follows_crop_and_reset() -> None:
    model, tiny, rows, cache, output = first_turn("llava", (1,))
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    length = cache.get_seq_length()
    assert not accepts(cache, changed(inputs, 0, length - 1))
    cache.crop(-2)
    other = changed(changed(inputs, 0, length - 1), 0, length - 2)
    assert accepts(cache, other)
    assert not accepts(cache, changed(inputs, 0, length - 3))
    ids = torch.cat([generate(model, other, **passed(cache)).sequences, torch.tensor([[5]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert accepts(cache, turn)
    assert not accepts(cache, {**turn, "input_ids": torch.cat([inputs["input_ids"][:, :length], ids[:, length:]], 1)})
    cache.reset()
    assert accepts(cache, changed(inputs, 0, 1))


@torch.no_grad()
def test_tokens_that_take_the_place_of_others_are_not_compared() -> None:
    """Calls of the model behind a crop and after a reset; then the length alone tells nothing."""
    model, tiny, rows, cache, output = first_turn("llava", (1,))
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    length = cache.get_seq_length()
    cache.crop(-2)
    model(input_ids=torch.tensor([[77, 77]]), **passed(cache))
    assert cache.get_seq_length() == length
    assert accepts(cache, changed(changed(inputs, 0, length - 1), 0, length - 2))
    assert not accepts(cache, changed(inputs, 0, length - 3))
    cache.reset()
    model(input_ids=torch.tensor([[77, 77]]), **passed(cache))
    ids = torch.tensor([[77, 77, 5]])
    assert accepts(cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@torch.no_grad()
def test_a_turn_that_was_refused_is_not_known() -> None:
    """NaN in its image; then the cache goes on with tokens of which it is not told."""
    model, tiny, rows, cache, output = first_turn("llava", (1,))
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    pixels = inputs["pixel_values"].clone()
    pixels[1] = torch.nan
    length = cache.get_seq_length()
    with pytest.raises(plphp.NonFiniteAttentionError, match="Nothing was read"):
        generate(model, {**inputs, "pixel_values": pixels}, **passed(cache))
    model(input_ids=torch.tensor([[77, 77]]), **passed(cache))
    assert accepts(cache, changed(changed(inputs, 0, length), 0, length + 1))


@torch.no_grad()
def test_a_turn_that_failed_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of a text turn; then the cache goes on with tokens of which it is not told."""
    model, tiny, rows, cache, output = first_turn("llava", (1,))
    inputs = whole(tiny.whole(model, rows, output.sequences, False))
    length = cache.get_seq_length()
    with monkeypatch.context() as patch:
        patch.setattr(model.get_decoder().layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(model, inputs, **passed(cache))
    assert cache.get_seq_length() == length
    model(input_ids=torch.tensor([[77, 77]]), **passed(cache))
    assert accepts(cache, changed(changed(inputs, 0, length), 0, length + 1))


def test_a_turn_that_was_planned_and_not_read_is_forgotten() -> None:
    model, tiny, rows, cache, output = first_turn("llava", (1,))
    rows = tiny.whole(model, rows, output.sequences, True)
    inputs = whole(rows)
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][1] += 1
    cache.plan(other)
    output = generate(model, inputs, **passed(cache))
    third = whole(tiny.whole(model, rows, output.sequences, False))
    assert not accepts(cache, {**third, "pixel_values": other["pixel_values"]})
    assert accepts(cache, third)


def test_several_sequences_of_each_prompt() -> None:
    model, tiny, rows, cache, output = first_turn(
        "llava", (1, 1), do_sample=True, num_return_sequences=2, temperature=2.0
    )
    rows = tiny.whole(model, [row for row in rows for _ in range(2)], output.sequences, True)
    inputs = whole(rows)
    assert accepts(cache, inputs)
    assert not accepts(cache, changed(inputs, 3, output.sequences.shape[1] - 3))
    assert not accepts(cache, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
    # two rows for four: each goes on from two answers, which differ
    assert not accepts(cache, whole(rows[::2]))
    generate(model, inputs, **passed(cache))


def test_an_answer_that_failed_is_not_compared() -> None:
    """The cache holds tokens that nobody has seen."""
    model, tiny = model_of("llava"), TINY["llava"]
    [row] = tiny.rows(model, [1])
    cache = PrunedCache.for_inputs(model, row, PRUNED)
    calls = []

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return scores

    with pytest.raises(RuntimeError, match="stopped"):
        generate(model, row, **passed(cache), logits_processor=[stop])
    length = row["input_ids"].shape[1]
    assert cache.get_seq_length() == length + 2
    ids = torch.cat([row["input_ids"], torch.tensor([[9, 9, 9]])], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert accepts(cache, turn)
    assert not accepts(cache, changed(turn, 0, length - 2))


def test_an_answer_that_was_replayed_from_a_graph_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(generation, "replayed", functools.partial(dispatch.replayed, capture=recorder.capture))
    monkeypatch.setattr(generation, "graph_obstacle", lambda *_: None)
    model, tiny = model_of("llava"), TINY["llava"]
    rows = tiny.rows(model, [2, 1])
    cache = PrunedCache.for_inputs(model, whole(rows), PRUNED, decode="graph")
    output = generate(model, whole(rows), **passed(cache), max_new_tokens=9)
    assert recorder.replays
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    assert accepts(cache, inputs)
    assert not accepts(cache, changed(inputs, 1, output.sequences.shape[1] - 2))
    assert accepts(cache, changed(inputs, 1, output.sequences.shape[1] - 1))


def test_a_session_goes_on_with_the_whole_chat() -> None:
    model, tiny = model_of("llava"), TINY["llava"]
    rows = tiny.rows(model, [2, 1])
    with plphp.prune(model, PRUNED) as run:
        first = generate(model, whole(rows))
        rows = tiny.whole(model, rows, first.sequences, True)
        generate(model, whole(rows), **passed(cache_in(first)))
        assert [prompt.start for prompt in run.report.prompts] == [0, first.sequences.shape[1] - 1]
        generate(model, whole(rows))
        assert [prompt.start for prompt in run.report.prompts] == [0]


def test_a_cache_of_transformers_is_left_alone() -> None:
    model, tiny = model_of("llava"), TINY["llava"]
    rows = tiny.rows(model, [2])
    cache = DynamicCache(config=model.config.get_text_config())
    lease = PrunedCache.for_inputs(model, whole(rows), plphp.PLPHPConfig())
    output = generate(model, whole(rows), **passed(cache))
    with pytest.raises(ValueError, match="do not match"):
        generate(model, whole(tiny.whole(model, rows, output.sequences, True)), **passed(cache))
    assert lease.get_seq_length() == 0
