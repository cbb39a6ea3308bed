# SPDX-License-Identifier: Apache-2.0
"""Later turns that are given the whole conversation with all its images, and histories that differ from what was read.

Logits are compared in float64, where float noise and a mistake are far apart.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from invariants import generate
from plphp import PLPHPConfig, PrunedCache, UnsupportedFeatureError
from plphp.engines.hf.cache_argument import passed
from test_invariants import FAMILIES
from tiny_models import IMAGE, TINY, TinyFamily, collate, drop_empty

NOISE = 1e-3
"""Models in float64, whose norms, rotary tables and logits transformers works out in float32, differ by 2e-5 at most;
another image, or a position that is one off, by 2e-2 at least."""
KEPT = PLPHPConfig(retention_rate=1.0)
PRUNED = PLPHPConfig(retention_rate=0.3, retention_delta=0.2, attentive_threshold=0.3)
VIDEOS = [name for name in FAMILIES if TINY[name].videos is not None]

Rows = list[dict[str, Any]]


@functools.cache
def model_of(name: str) -> Any:
    """A tiny model in float64, rotary frequencies too."""
    model = TINY[name].build(dtype=torch.float64).double()
    model.set_experts_implementation("eager")  # grouped matrix products know no float64
    return model


def whole(rows: Rows) -> dict[str, Any]:
    """What the processor returns for conversations with all their images."""
    return drop_empty(collate(rows))


def only_new(
    tiny: TinyFamily, model: Any, before: dict[str, Any], output: Any, image: bool, seed: int
) -> dict[str, Any]:
    """The same turn with the features of its new images alone."""
    turn = tiny.second_turn(model, before, output.sequences, with_image=image, seed=seed)
    turn.pop("position_ids", None)
    return turn


def assert_same_generation(first: Any, second: Any) -> None:
    """The same computation: equal to the last bit."""
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))


def first_turn(name: str, images: tuple[int, ...] = (2, 1), config: PLPHPConfig = PRUNED, **kwargs: Any) -> Any:
    """Model, rows, cache and output of a first turn."""
    model, tiny = model_of(name), TINY[name]
    inputs = tiny.inputs(model, images)
    cache = PrunedCache.for_inputs(model, inputs, config)
    return model, tiny, tiny.rows(model, images), cache, generate(model, inputs, **passed(cache), **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_with_all_images_are_turns_with_the_new_ones(name: str) -> None:
    """Four turns of a batch with different numbers of images: the later ones add an image, text alone, an image."""
    model, tiny = model_of(name), TINY[name]
    rows = tiny.rows(model, [2, 1])
    inputs = whole(rows)
    caches = [PrunedCache.for_inputs(model, inputs, PRUNED) for _ in range(2)]
    outputs = [generate(model, inputs, **passed(cache)) for cache in caches]
    for seed, image in enumerate((True, False, True), 1):
        new = only_new(tiny, model, inputs, outputs[1], image, seed)
        rows = tiny.whole(model, rows, outputs[0].sequences, image, seed)
        inputs = whole(rows)
        outputs = [generate(model, sent, **passed(cache)) for sent, cache in zip((inputs, new), caches, strict=True)]
        assert_same_generation(*outputs)
    reports = [cache.report() for cache in caches]
    assert len(reports[0].prompts) == 3
    assert reports[0].prompts == reports[1].prompts


@pytest.mark.parametrize("name", [name for name in FAMILIES if TINY[name].stock.second_turn_image])
def test_turns_with_all_images_are_one_prompt(name: str) -> None:
    """The same without eviction, against transformers' own reading of the whole conversation, row by row."""
    model, tiny, rows, cache, output = first_turn(name, config=KEPT)
    for seed, image in enumerate((True, False, True), 1):
        rows = tiny.whole(model, rows, output.sequences, image, seed)
        output = generate(model, whole(rows), **passed(cache))
        assert_rows_alone(model, rows, output)


def assert_rows_alone(model: Any, rows: Rows, output: Any) -> None:
    """Each row of an output is what stock ``generate`` says to the whole conversation of that row."""
    for number, row in enumerate(rows):
        expected = generate(model, row)
        assert torch.equal(expected.sequences[0, -4:], output.sequences[number, -4:])
        for logits, batched in zip(expected.logits, output.logits, strict=True):
            assert (logits[0] - batched[number]).abs().max() < NOISE


def with_videos(tiny: TinyFamily) -> TinyFamily:
    """The family with videos where it has images."""
    assert tiny.videos is not None
    return replace(tiny, images=tiny.videos)


@pytest.mark.parametrize("kinds", ["video-video", "video-image", "image-video"])
@pytest.mark.parametrize("name", VIDEOS)
def test_videos_and_images_in_one_conversation(name: str, kinds: str) -> None:
    model = model_of(name)
    tinies = [with_videos(TINY[name]) if kind == "video" else TINY[name] for kind in kinds.split("-")]
    rows = tinies[0].rows(model, [2, 1])
    caches = [PrunedCache.for_inputs(model, whole(rows), KEPT) for _ in range(2)]
    first, output = (generate(model, whole(rows), **passed(cache)) for cache in caches)
    new = only_new(tinies[1], model, whole(rows), first, True, 1)
    rows = tinies[1].whole(model, rows, output.sequences, True)
    output = generate(model, whole(rows), **passed(caches[1]))
    assert_same_generation(generate(model, new, **passed(caches[0])), output)
    mixed_glm = name.startswith("glm") and kinds != "video-video"  # stock ``generate`` stops: it takes one of them
    if not mixed_glm:
        assert_rows_alone(model, rows, output)
    third = tinies[0].whole(model, rows, output.sequences, False, seed=2)
    output = generate(model, whole(third), **passed(caches[1]))
    if not mixed_glm:
        assert_rows_alone(model, third, output)


def test_seconds_per_grid_place_the_videos_of_every_turn() -> None:
    """Qwen2.5-VL stretches the positions of a video by its rate; the turn after it stands behind them."""
    model, tiny = model_of("qwen2.5-vl"), with_videos(TINY["qwen2.5-vl"])
    seconds = torch.tensor([0.75])
    [row] = tiny.rows(model, [1])
    row["second_per_grid_ts"] = seconds
    cache = PrunedCache.for_inputs(model, row, KEPT)
    output = generate(model, row, **passed(cache))
    for seed, video in enumerate((True, False), 1):
        [row] = tiny.whole(model, [row], output.sequences, video, seed)
        row["second_per_grid_ts"] = torch.cat([seconds, torch.tensor([0.5])])
        slow = {**row, "second_per_grid_ts": torch.ones(2)}
        output = generate(model, row, **passed(cache))
        assert_rows_alone(model, [row], output)
        assert (generate(model, slow).logits[0] - output.logits[0]).abs().max() > 10 * NOISE


@pytest.mark.parametrize("images", [(0, 2, 1), (3, 0)], ids=str)
@pytest.mark.parametrize(
    "name", ["idefics3", "idefics2", "llava-next", "llava-pixtral", "qwen2-vl", "gemma4", "lfm2-vl"]
)
def test_rows_that_had_no_image_before(name: str, images: tuple[int, ...]) -> None:
    model, tiny, rows, cache, output = first_turn(name, images, KEPT)
    rows = tiny.whole(model, rows, output.sequences, True)
    assert_rows_alone(model, rows, generate(model, whole(rows), **passed(cache)))


def test_images_of_onevision_stay_as_they_were_cut() -> None:
    """Two images and then a third are not tiled; what is left to read is one image, which would be tiled alone."""
    model, tiny = model_of("llava-onevision"), TINY["llava-onevision"]
    rows = tiny.rows(model, [2])
    three = tiny.rows(model, [3])[0]
    per_image = 4 * 4 + 1
    new = torch.tensor([[5, 6, *[IMAGE] * per_image, 7, 8]])
    cache = PrunedCache.for_inputs(model, rows[0], KEPT)
    output = generate(model, rows[0], **passed(cache))
    pixels = torch.cat([rows[0]["pixel_values"], three["pixel_values"][2:]])
    row = {
        "input_ids": torch.cat([output.sequences, new], 1),
        "attention_mask": torch.ones(1, output.sequences.shape[1] + new.shape[1], dtype=torch.long),
        "pixel_values": pixels,
        "image_sizes": three["image_sizes"],
        "batch_num_images": torch.tensor([3]),
    }
    assert_rows_alone(model, [row], generate(model, row, **passed(cache)))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_plan_says_what_the_model_has_to_read(name: str) -> None:
    model, tiny = model_of(name), TINY[name]
    [row] = tiny.rows(model, [2])
    expected_cache, cache = (PrunedCache.for_inputs(model, row, PRUNED) for _ in range(2))
    expected = generate(model, row, **passed(expected_cache))
    logits = model(**cache.model_inputs(cache.plan(row)), **passed(cache)).logits[:, -1]
    assert torch.equal(logits.float(), expected.logits[0])
    for step in expected.sequences[0, -4:-1].tolist():
        token = torch.tensor([[step]])
        model(input_ids=token, **passed(cache))
    [row] = tiny.whole(model, [row], expected.sequences, True)
    expected = generate(model, row, **passed(expected_cache))
    turn = cache.model_inputs(cache.plan(row))
    assert turn["input_ids"].shape[1] == row["input_ids"].shape[1] - cache.get_seq_length()
    logits = model(**turn, **passed(cache)).logits[:, -1]
    assert torch.equal(logits.float(), expected.logits[0])
    assert cache.report().prompts == expected_cache.report().prompts


@pytest.mark.parametrize("name", ["llava", "qwen2-vl", "idefics3", "gemma3"])
@torch.no_grad()
def test_the_model_reads_a_padded_batch_as_generate_does(name: str) -> None:
    model, tiny, rows, cache, output = first_turn(name)
    inputs = whole(tiny.whole(model, rows, output.sequences, True))
    expected = generate(model, inputs, **passed(copy.deepcopy(cache)))
    logits = model(**cache.model_inputs(cache.plan(inputs)), **passed(cache)).logits[:, -1]
    assert torch.equal(logits.float(), expected.logits[0])


@pytest.mark.parametrize("search", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_new_images_beside_old_ones_are_not_repeated(search: dict[str, Any]) -> None:
    """Transformers would count the old images' placeholders too; a refused turn leaves the cache as it was."""
    model, tiny, rows, cache, output = first_turn("llava", (1,))
    turn = whole(tiny.whole(model, rows, output.sequences, True))
    with pytest.raises(UnsupportedFeatureError, match="give them to the wrong rows"):
        generate(model, turn, **passed(cache), **search)
    generate(model, turn, **passed(cache))
    assert len(cache.report().prompts) == 2
