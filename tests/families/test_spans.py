# SPDX-License-Identifier: Apache-2.0
"""Positions of vision tokens and of the query rows that score them, against naive Python."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PretrainedConfig

from plphp import SpanError
from plphp.families.base import Family, VisionSegment
from plphp.families.spans import VisionSpans, find_spans, query_mask

TEXT, IMAGE, PAD = 5, 9, 0
CONFIG = PretrainedConfig()


def family(segments: list[VisionSegment] | None = None) -> Family:
    return Family("toy", ("toy",), lambda config: (IMAGE, 10), lambda config, inputs: segments)


def inputs_of(rows: list[list[int]], features: bool = False, **more: Any) -> dict[str, Any]:
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **more}
    return {**inputs, "pixel_values": torch.zeros(1)} if features else inputs


def spans_of(rows: list[list[int]], **kwargs: Any) -> VisionSpans:
    segments = kwargs.pop("segments", None)
    past = kwargs.pop("past_length", 0)
    mask = kwargs.pop("vision_mask", None)
    inputs = inputs_of(rows, features=segments is not None, **kwargs)
    return find_spans(family(segments), CONFIG, inputs, past_length=past, vision_mask=mask)


def naive_segments(row: list[int], past: int) -> list[int]:
    """Number of the contiguous run of vision tokens at each position, counted over the new part."""
    result, number, before = [], -1, False
    for position, token in enumerate(row):
        vision = token == IMAGE and position >= past
        number += vision and not before
        result.append(number if vision else -1)
        before = vision
    return result


@st.composite
def batches(draw: st.DrawFn) -> list[list[int]]:
    """Rows of text and image tokens with padding on the left or on the right."""
    length = draw(st.integers(1, 14))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        pads = draw(st.integers(0, length - 1))
        tokens = draw(st.lists(st.sampled_from([TEXT, IMAGE]), min_size=length - pads, max_size=length - pads))
        rows.append([PAD] * pads + tokens if draw(st.booleans()) else tokens + [PAD] * pads)
    return rows


@settings(deadline=None)
@given(batches())
def test_each_run_of_vision_tokens_is_an_image(rows: list[list[int]]) -> None:
    spans = spans_of(rows)
    assert spans.segment.tolist() == [naive_segments(row, 0) for row in rows]
    assert spans.valid.tolist() == [[token != PAD for token in row] for row in rows]
    assert (spans.start, spans.end) == (0, len(rows[0]))
    assert spans.grids == tuple((None,) * (max(naive_segments(row, 0)) + 1) for row in rows)
    assert torch.equal(spans.vision, torch.tensor(rows) == IMAGE)


@settings(deadline=None)
@given(batches(), st.data())
def test_later_turn_as_the_whole_and_as_the_new_part(rows: list[list[int]], data: st.DataObject) -> None:
    past = data.draw(st.integers(0, len(rows[0]) - 1))
    # Padding of a later turn is anywhere; every row needs a token in the new part.
    rows = [[*row[:-1], row[-1] or TEXT] for row in rows]
    whole = spans_of(rows, past_length=past)
    expected = [naive_segments(row, past) for row in rows]
    assert whole.segment.tolist() == expected
    assert (whole.start, whole.end) == (past, len(rows[0]))
    mask = (torch.tensor(rows) != PAD).long()
    left_out = data.draw(st.integers(0, past))
    part = spans_of([row[left_out:] for row in rows], past_length=past, attention_mask=mask)
    assert torch.equal(part.segment, whole.segment)
    assert torch.equal(part.valid, whole.valid)
    assert (part.start, part.end, part.grids) == (whole.start, whole.end, whole.grids)


@settings(deadline=None)
@given(batches(), st.data())
def test_segments_number_the_images_within_their_row(rows: list[list[int]], data: st.DataObject) -> None:
    """Images whose tokens touch are kept apart, and get the grid that their features have."""
    segments, expected, grids = [], [], []
    for row in rows:
        numbers, sizes, position = [-1] * len(row), [], 0
        vision = [index for index, token in enumerate(row) if token == IMAGE]
        while position < len(vision):
            size = data.draw(st.integers(1, len(vision) - position))
            for index in vision[position : position + size]:
                numbers[index] = len(sizes)
            sizes.append(size)
            position += size
        expected.append(numbers)
        grids.append(tuple((1, 1, size) for size in sizes))
        segments += [VisionSegment(size, (1, 1, size)) for size in sizes]
    if not segments:
        return
    spans = spans_of(rows, segments=segments)
    assert spans.segment.tolist() == expected
    assert spans.grids == tuple(grids)


def test_later_turn_takes_the_features_of_the_new_part() -> None:
    rows = [[TEXT, IMAGE, IMAGE, TEXT, IMAGE, IMAGE, IMAGE, TEXT]]
    new = VisionSegment(3, (1, 1, 3))
    part = spans_of(rows, past_length=4, segments=[new])
    assert part.vision.tolist() == [[False] * 4 + [True] * 3 + [False]]
    assert part.grids == (((1, 1, 3),),)
    with pytest.raises(SpanError, match=r"holds 3 vision tokens and the whole conversation 5, .* images fill 5: "):
        spans_of(rows, past_length=4, segments=[VisionSegment(2, (1, 1, 2)), new])


def test_later_turn_whose_features_fill_nothing() -> None:
    """As the images of zeros by which Idefics pads a row."""
    spans = spans_of([[TEXT, IMAGE, IMAGE, TEXT, TEXT]], past_length=3, segments=[])
    assert spans.segment.tolist() == [[-1] * 5]
    assert spans.grids == ((),)


def test_vision_tokens_that_the_mask_hides_do_not_shift_the_other_images() -> None:
    """The model fills masked placeholders too, so the images behind them keep their numbers and grids."""
    rows = [[TEXT, IMAGE, IMAGE, TEXT, IMAGE, IMAGE, IMAGE, TEXT]]
    segments = [VisionSegment(2, (1, 1, 2)), VisionSegment(3, (1, 1, 3))]
    mask = torch.tensor([[1, 0, 0, 1, 1, 1, 1, 1]])
    spans = spans_of(rows, segments=segments, attention_mask=mask)
    assert spans.segment.tolist() == [[-1, -1, -1, -1, 1, 1, 1, -1]]
    assert spans.grids == (((1, 1, 2), (1, 1, 3)),)


def test_without_features_what_the_mask_hides_is_no_image() -> None:
    mask = torch.tensor([[0, 1, 1, 1]])
    spans = spans_of([[IMAGE, TEXT, IMAGE, TEXT]], attention_mask=mask)
    assert spans.segment.tolist() == [[-1, -1, 0, -1]]
    assert spans.grids == ((None,),)


@pytest.mark.parametrize(("sizes", "fills"), [([2], 2), ([4], 4), ([2, 2], 4), ([], 0)])
def test_images_that_do_not_match_the_vision_tokens(sizes: list[int], fills: int) -> None:
    with pytest.raises(SpanError) as error:
        spans_of([[TEXT, IMAGE, IMAGE, IMAGE, TEXT]], segments=[VisionSegment(size) for size in sizes])
    assert f"holds 3 vision tokens but the images fill {fills}" in str(error.value)
    assert "pixel_values" in str(error.value)


def test_features_without_vision_tokens() -> None:
    message = re.escape("pixel_values are given, but the prompt holds no vision token (ids (9, 10) for toy)")
    with pytest.raises(SpanError, match=message):
        spans_of([[TEXT, TEXT]], segments=[VisionSegment(2)])


def test_family_that_does_not_tell_the_segments() -> None:
    inputs = inputs_of([[TEXT, IMAGE, IMAGE, TEXT, IMAGE]], features=True)
    spans = find_spans(family(None), CONFIG, inputs)
    assert spans.segment.tolist() == [[-1, 0, 0, -1, 1]]
    assert spans.grids == ((None, None),)


def test_every_vision_id_of_the_family_counts() -> None:
    assert spans_of([[TEXT, IMAGE, 10, TEXT]]).vision.tolist() == [[False, True, True, False]]


def test_one_vision_token_and_a_row_without_images() -> None:
    spans = spans_of([[PAD, TEXT, IMAGE], [TEXT, TEXT, TEXT]])
    assert spans.segment.tolist() == [[-1, -1, 0], [-1, -1, -1]]
    assert spans.grids == ((None,), ())


def test_repeated_rows() -> None:
    spans = spans_of([[PAD, IMAGE, TEXT], [TEXT, TEXT, TEXT]]).repeated(2)
    assert spans.segment.tolist() == [[-1, 0, -1]] * 2 + [[-1] * 3] * 2
    assert spans.valid.tolist() == [[False, True, True]] * 2 + [[True] * 3] * 2
    assert spans.grids == ((None,), (None,), (), ())


def test_vision_mask_takes_the_place_of_the_ids() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    embeds = torch.randn(2, 4, 3)
    padding = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    inputs = {"inputs_embeds": embeds, "attention_mask": padding}
    spans = find_spans(family(), CONFIG, inputs, vision_mask=mask)
    assert spans.segment.tolist() == [[-1, 0, 0, -1], [-1, -1, -1, 0]]
    only = find_spans(family(), CONFIG, {"inputs_embeds": embeds}, vision_mask=mask.bool())
    assert only.vision.tolist() == mask.bool().tolist()
    bare = find_spans(family(), CONFIG, {}, vision_mask=mask.bool())
    assert torch.equal(bare.segment, only.segment)


def test_vision_mask_over_a_later_turn_is_over_the_whole() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 0]])
    inputs = {"input_ids": torch.full((1, 3), TEXT), "attention_mask": torch.ones(1, 6)}
    spans = find_spans(family(), CONFIG, inputs, past_length=3, vision_mask=mask)
    assert spans.vision.tolist() == [[False] * 4 + [True, False]]


IDS = torch.full((2, 3), TEXT)


@pytest.mark.parametrize(
    ("inputs", "past", "mask", "message"),
    [
        ({}, 0, None, "neither input_ids nor inputs_embeds"),
        ({"pixel_values": 1}, 0, None, r"neither input_ids nor inputs_embeds; got \['pixel_values'\]"),
        ({"inputs_embeds": torch.zeros(2, 3, 4)}, 0, None, "has no input_ids, .* vision_mask="),
        ({"input_ids": IDS[:, :0]}, 0, None, r"holds no tokens: input_ids have the shape \(2, 0\)"),
        ({"input_ids": IDS[:0]}, 0, None, r"holds no tokens: input_ids have the shape \(0, 3\)"),
        ({"input_ids": IDS[0]}, 0, None, r"input_ids must be \[batch, seq\], got the shape \(3,\)"),
        ({"input_ids": [[1, 2]]}, 0, None, r"input_ids must be \[batch, seq\], got a list"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 2)}, 0, None, r"\(2, 3\) .* got the shape \(2, 2\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 3)}, 0, None, r"got the shape \(1, 3\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}, 0, None, r"got the shape \(2, 1, 3, 3\)"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, 0, None, "attention_mask .* got a list"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, 0, None, "covers 5 tokens, .* hold 3 and the cache 0"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 6)}, 2, None, "covers 6 tokens, .* hold 3 and the cache 2"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, 0, None, "all padding"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}, 2, None, "all padding"),
        ({"input_ids": IDS}, 3, None, "holds 3 tokens already and the prompt has 3"),
        ({"input_ids": IDS}, 7, None, "holds 7 tokens already and the prompt has 3"),
        ({"input_ids": IDS}, 0, torch.ones(2, 2), r"vision_mask .* \(2, 3\), got the shape \(2, 2\)"),
        ({"input_ids": IDS}, 0, torch.ones(3), r"vision_mask .* \(2, 3\), got the shape \(3,\)"),
        ({"input_ids": IDS}, 0, [[1, 0, 0]] * 2, r"vision_mask .* got a list"),
    ],
)  # fmt: skip
def test_inputs_that_are_no_prompt(inputs: dict[str, Any], past: int, mask: Any, message: str) -> None:
    with pytest.raises(SpanError, match=message):
        find_spans(family(), CONFIG, inputs, past_length=past, vision_mask=mask)


def naive_query_mask(row: list[int], start: int, query_rows: int | str) -> list[bool]:
    new = [index for index, token in enumerate(row) if token != PAD and index >= start]
    if query_rows == "text":
        last_vision = max((index for index in new if row[index] == IMAGE), default=-1)
        queries = [index for index in new if index > last_vision] or new[-1:]
    else:
        queries = new[-int(query_rows) :]
    return [index in queries for index in range(len(row))]


@settings(deadline=None)
@given(batches(), st.integers(1, 8) | st.just("text"), st.data())
def test_query_mask(rows: list[list[int]], query_rows: int | str, data: st.DataObject) -> None:
    """Also for prompts that end in an image, for padding on either side, and for rows without images."""
    start = data.draw(st.integers(0, len(rows[0]) - 1))
    rows = [row if any(row[start:]) else [*row[:-1], TEXT] for row in rows]
    spans = spans_of(rows, past_length=start)
    expected = [naive_query_mask(row, start, query_rows) for row in rows]
    assert query_mask(spans, query_rows).tolist() == expected  # type: ignore[arg-type]


def test_prompt_that_ends_in_an_image_is_scored_by_its_last_vision_token() -> None:
    spans = spans_of([[TEXT, IMAGE, IMAGE]])
    for rows in (1, "text"):
        assert query_mask(spans, rows).tolist() == [[False, False, True]]
