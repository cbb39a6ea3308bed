# SPDX-License-Identifier: Apache-2.0
"""Every family against its tiny model and against the processors of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import plphp
from plphp import PLPHPConfig
from plphp.errors import PLPHPError
from plphp.families._segments import in_prompt_order
from plphp.families.base import Family, VisionSegment
from plphp.families.registry import available_families, family_of
from plphp.families.unsupported import UNSUPPORTED, reason_against
from tiny_models import IMAGE, REFUSED, SPECIAL, TEXT_IDS, TINY, VIDEO

ROWS = ([1], [3], [2, 1], [0, 2, 1], [0])
NAMES = sorted(TINY)
VIDEO_NAMES = [name for name in NAMES if TINY[name].videos is not None]


def family(config: Any) -> Family:
    match = family_of(config)
    assert config.model_type in match.model_types
    return match


def check(config: Any, inputs: dict[str, Any]) -> list[VisionSegment]:
    """Return the segments after comparing them with the placeholders of the prompt."""
    segments = family(config).segments(config, inputs)
    ids = family(config).vision_token_ids(config)
    placeholders = int(torch.isin(inputs["input_ids"], torch.tensor(ids)).sum())
    assert segments is not None
    assert sum(segment.tokens for segment in segments) == placeholders
    for segment in segments:
        assert segment.tokens > 0
        assert segment.grid is None or math.prod(segment.grid) == segment.tokens
    return segments


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_segments_fill_the_placeholders_of_images(name: str, rows: list[int]) -> None:
    model = TINY[name].build()
    inputs = TINY[name].inputs(model, rows)
    segments = check(model.config, inputs)
    assert all(segment.kind == "image" for segment in segments)
    assert len(segments) >= sum(rows)


@pytest.mark.parametrize("rows", [[1], [2, 1], [0, 2]], ids=str)
@pytest.mark.parametrize("name", VIDEO_NAMES)
def test_segments_fill_the_placeholders_of_videos(name: str, rows: list[int]) -> None:
    model = TINY[name].build()
    segments = check(model.config, TINY[name].inputs(model, rows, video=True))
    if name != "internvl":  # its processor does not tell frames from tiles
        assert [segment.kind for segment in segments] == ["video"] * sum(rows)


@pytest.mark.parametrize("name", NAMES)
def test_rows_alone_have_the_segments_of_the_batch(name: str) -> None:
    model, rows = TINY[name].build(), [2, 0, 1]
    alone = [check(model.config, row) for row in TINY[name].rows(model, rows)]
    assert check(model.config, TINY[name].inputs(model, rows)) == [s for row in alone for s in row]


@pytest.mark.parametrize("name", NAMES)
def test_vision_ids_are_the_placeholders_alone(name: str) -> None:
    config = TINY[name].config()
    ids = family(config).vision_token_ids(config)
    assert IMAGE in ids
    assert set(ids) <= {IMAGE, VIDEO} <= set(SPECIAL)
    assert not any(TEXT_IDS[0] <= token < TEXT_IDS[1] for token in ids)


@pytest.mark.parametrize("name", NAMES)
def test_segments_of_a_prompt_without_images(name: str) -> None:
    config = TINY[name].config()
    assert family(config).segments(config, {"input_ids": torch.tensor([[1, 3, 4]])}) == []


EQUAL_TILES = ("deepseek-vl", "internvl", "idefics3", "llava-siglip", "cohere2-vision", "llama4", "ovis2", "paligemma")


@pytest.mark.parametrize("name", [name for name in EQUAL_TILES if name in TINY])
def test_rows_and_columns_of_images_of_the_towers_size(name: str) -> None:
    config = TINY[name].config()
    pixel_values = torch.ones(1, 3, 16, 32)
    if name == "idefics3":
        pixel_values = pixel_values[None]
    (segment,) = family(config).segments(config, {"pixel_values": pixel_values}) or ()
    assert segment.grid == (1, 2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_model_names_its_family(name: str) -> None:
    assert TINY[name].family == family(TINY[name].config()).name


def test_every_model_type_has_a_tiny_model() -> None:
    types = {model_type for known in available_families().values() for model_type in known.model_types}
    untested = set() if "llama4" in TINY else {"llama4"}  # broken in transformers 5.24.0
    assert {tiny.config().model_type for tiny in TINY.values()} == types - untested


def test_model_types_belong_to_one_family_or_are_unsupported() -> None:
    types = [model_type for known in available_families().values() for model_type in known.model_types]
    assert len(types) == len(set(types))
    assert not set(types) & set(UNSUPPORTED)
    assert all(reason.endswith(".") and reason[0].islower() for reason in UNSUPPORTED.values())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_text_models_of_another_kind_are_refused(name: str) -> None:
    tiny, model = REFUSED[name], REFUSED[name].build()
    inputs = tiny.inputs(model)
    with pytest.raises(PLPHPError), plphp.prune(model, PLPHPConfig()):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


@pytest.mark.parametrize(("name", "word"), [("gemma4-shared", "earlier layers"), ("mistral3-mla", "MLA")])
def test_reason_against_a_text_model(name: str, word: str) -> None:
    assert word in (reason_against(REFUSED[name].config()) or "")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_speaks_against_the_supported(name: str) -> None:
    assert reason_against(TINY[name].config()) is None


def test_mixed_modalities_follow_the_prompt() -> None:
    image, second, video = VisionSegment(2), VisionSegment(1), VisionSegment(3, kind="video")
    ids = torch.tensor([[1, VIDEO, 3, VIDEO, VIDEO, 4], [IMAGE, IMAGE, 3, IMAGE, 5, 6]])
    queues = {IMAGE: [image, second], VIDEO: [video]}
    assert in_prompt_order({"input_ids": ids}, queues) == [video, image, second]
    assert in_prompt_order({}, queues) is None
    assert in_prompt_order({}, {IMAGE: [image], VIDEO: []}) == [image]
    assert in_prompt_order({"input_ids": torch.cat([ids, ids])}, queues) is None
    assert in_prompt_order({"input_ids": ids[:1]}, queues) == [image, second, video]
    wrong = {IMAGE: [VisionSegment(4)], VIDEO: [VisionSegment(2)]}
    assert in_prompt_order({"input_ids": ids}, wrong) is None
