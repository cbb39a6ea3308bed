# SPDX-License-Identifier: Apache-2.0
"""The first steps of an answer show which images it turns to: as dense attention over what is held says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import plphp
from memory_chat import answer, converse, dense_copy, next_turn
from plphp.engines.hf import memory_cache
from plphp.engines.hf.cache_argument import passed
from plphp.pruning import image_report
from plphp.pruning.asked_images import LOOKED
from plphp.pruning.report import PruneReport
from precision import assert_exact
from tiny_models import TIERS, tiers_model

pytestmark = pytest.mark.usefixtures("float64")

SETTINGS = ("none:vision_budget=12kB", "plphp:vision_budget=8kB", "none:vision_budget=1GB")


def step_of(inputs: Any, token: int, number: int) -> dict[str, torch.Tensor]:
    """Arguments of a decoding step behind a turn and so many steps."""
    rows = len(inputs["input_ids"])
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(rows, number + 1)], 1)
    return {
        "input_ids": torch.full((rows, 1), token),
        "attention_mask": mask,
        "position_ids": mask.long().cumsum(1)[:, -1:] - 1,
    }


def turned(weights: torch.Tensor, positions: torch.Tensor) -> float:
    """The figure of an image, from dense weights [steps, layers, q_heads, seq] of its row."""
    mass = weights[..., positions].sum(-1)
    return float((mass.amax(0) - mass.mean(0)).max())


@pytest.mark.parametrize("rows", [(1,), (2, 1), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_figures_are_those_of_dense_attention(settings: str, rows: tuple[int, ...]) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    chat = converse(model, tiny, settings, 3, rows=rows)
    cache = chat.cache
    inputs = next_turn(model, tiny, chat.inputs, chat.outputs[-1].sequences, seed=9, with_image=False)
    with torch.no_grad():
        model(**cache.model_inputs(cache.plan(inputs)), **passed(cache))
        steps, length = [], inputs["input_ids"].shape[1]
        for number in range(LOOKED + 1):
            step, weights = step_of(inputs, 7 + number, number), dict[int, torch.Tensor]()
            with dense_copy(model, cache, weights) as dense:
                model(**step, **passed(dense))
            model(**step, **passed(cache))
            steps.append(torch.stack([weights[layer][:, :, -1, :length] for layer in range(len(cache.layers))], 1))
    assert not cache.looking
    dense_weights = torch.stack(steps[:LOOKED])
    for row, own in enumerate(cache._images.rows):
        figures = [image.attention for image in cache.images if image.row == row]
        expected = [turned(dense_weights[:, row], image.positions) for image in own]
        assert_exact(torch.tensor(figures, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64))
        assert len(set(expected)) == len(own)


def test_the_first_steps_of_every_answer_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tiny, calls = tiers_model("llava"), TIERS["llava"], []

    class Counted(memory_cache.AskedImages):
        def note(self, attended: Any) -> None:
            calls.append(attended.layer)
            super().note(attended)

    monkeypatch.setattr(memory_cache, "AskedImages", Counted)
    chat = converse(model, tiny, "none:vision_budget=12kB", 2, min_new_tokens=LOOKED + 4, max_new_tokens=LOOKED + 4)
    layers = list(range(len(chat.cache.layers)))
    assert calls == layers * 2 * LOOKED
    first = [image.attention for image in chat.cache.images]
    assert all(first)
    inputs = next_turn(model, tiny, chat.inputs, chat.outputs[-1].sequences, seed=3, with_image=False)
    answer(model, chat.cache, inputs, min_new_tokens=4, max_new_tokens=4)
    assert calls == layers * (2 * LOOKED + 3)
    second = [image.attention for image in chat.cache.images]
    assert all(second)
    assert second != first
    calls.clear()
    converse(model, tiny, "quantized", 2)
    converse(model, tiny, "none:vision_budget=12kB", 1, max_new_tokens=1)
    assert calls == []


def test_what_has_faded_and_an_answer_turns_to_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    cache = converse(model, tiny, "none:vision_budget=5kB", 4).cache
    monkeypatch.setattr(image_report, "FADED", 0.3)
    top = max(cache.images, key=lambda image: image.attention)
    monkeypatch.setattr(image_report, "ASKED", top.attention)
    assert [image.number for image in cache.report().wanted] == [top.number]
    assert PruneReport.from_json(cache.report().to_json()).wanted == cache.report().wanted
    monkeypatch.setattr(image_report, "FADED", top.held)
    assert cache.report().wanted == []
    monkeypatch.undo()
    cache.forget(top.number)
    assert not cache.images[top.number].wanted


def test_several_sequences_and_beams() -> None:
    """Sequences of a prompt share its entries; beams are no rows of the conversation, and are not looked at."""
    model, tiny = tiers_model("llava"), TIERS["llava"]
    several = {"num_return_sequences": 2, "do_sample": True, "min_new_tokens": 4, "max_new_tokens": 4}
    cache = converse(model, tiny, "none:vision_budget=20kB", 1, rows=(2, 1), **several).cache
    assert len(cache.images) == 6
    assert all(0 < image.attention < 1 for image in cache.images)
    cache = converse(model, tiny, "none:vision_budget=20kB", 1, rows=(2, 1), num_beams=2).cache
    assert {image.attention for image in cache.images} == {0.0}
    assert not cache.looking


def test_an_answer_of_one_token_forgets_what_the_last_one_turned_to() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    chat = converse(model, tiny, "none:vision_budget=1GB", 1, min_new_tokens=3)
    assert chat.cache.images[0].attention > 0
    inputs = next_turn(model, tiny, chat.inputs, chat.outputs[-1].sequences, seed=3, with_image=False)
    answer(model, chat.cache, inputs, max_new_tokens=1)
    assert chat.cache.images[0].attention == 0


def test_the_figures_go_with_the_rows() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    cache = converse(model, tiny, "none:vision_budget=1GB", 1, rows=(2, 1), min_new_tokens=3).cache
    figures = [image.attention for image in cache.images]
    cache.batch_select_indices(torch.tensor([1]))
    assert [image.attention for image in cache.images] == figures[2:]
    copied = copy.deepcopy(cache)
    assert copied.images == cache.images
    assert isinstance(copied, plphp.PrunedCache)
