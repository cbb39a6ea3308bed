# SPDX-License-Identifier: Apache-2.0
"""What stock ``generate`` does with the tiny models: the ground that the invariants stand on.

A test that starts to fail with a new transformers says which field of `Stock` to change.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from plphp.engines.hf.cache_argument import passed
from precision import EXACT, max_difference
from tiny_models import ANY, NEWEST, TINY

pytestmark = pytest.mark.usefixtures("float64")

NAMES = sorted(TINY)
CASES = [(name, video) for name in NAMES for video in (False, True) if not video or TINY[name].videos is not None]
MROPE = [name for name in NAMES if name.startswith(("qwen", "glm"))]


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(**inputs, **{**options, **kwargs})


def fresh(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())


def differences(batch: Any, alone: list[Any]) -> list[float]:
    """Return the largest difference of the first logits of each row."""
    return [max_difference(row.logits[0][0], batch.logits[0][i]) for i, row in enumerate(alone)]


@pytest.mark.parametrize(("name", "video"), CASES)
def test_padded_row_equals_row_alone(name: str, video: bool) -> None:
    tiny, model = TINY[name], TINY[name].build()
    rows = [1, 2] if video else [2, 1, 0]
    batch = generate(model, tiny.inputs(model, rows, video=video))
    alone = [generate(model, row) for row in tiny.rows(model, rows, video=video)]
    assert max(differences(batch, alone)) < EXACT
    for index, row in enumerate(alone):
        assert torch.equal(row.sequences[0, -4:], batch.sequences[index, -4:])


@pytest.mark.parametrize(("name", "video"), CASES)
def test_images_matter_to_their_row_alone(name: str, video: bool) -> None:
    tiny, model = TINY[name], TINY[name].build()
    rows = tiny.rows(model, [1], video=video)
    (pixels,) = (key for key in rows[0] if key.startswith("pixel_values"))
    mirrored = {**rows[0], pixels: rows[0][pixels].flip(-1)}
    change = max_difference(generate(model, rows[0]).logits[0], generate(model, mirrored).logits[0])
    assert change > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_answers_vary(name: str) -> None:
    tiny, model = TINY[name], TINY[name].build()
    inputs = tiny.inputs(model, [1, 2, 1, 1])
    output = generate(model, inputs, max_new_tokens=8)
    answers, logits = output.sequences[:, -8:], output.logits[0]
    assert len({tuple(row) for row in answers.tolist()}) > 1
    assert len(answers.unique()) > 4
    assert all(max_difference(*pair) > 0.02 for pair in itertools.combinations(logits, 2))


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_second_turn_equals_whole_prompt(name: str, with_image: bool) -> None:
    tiny, model = TINY[name], TINY[name].build()
    rows = [2, 1, 0]
    inputs, cache = tiny.inputs(model, rows), fresh(model)
    first = generate(model, inputs, **passed(cache)).sequences
    second = generate(model, tiny.second_turn(model, inputs, first, with_image=with_image), **passed(cache))
    whole = [generate(model, row) for row in tiny.whole(model, tiny.rows(model, rows), first, with_image)]
    exact = max(differences(second, whole)) < EXACT
    assert exact == (tiny.stock.second_turn_image if with_image else tiny.stock.second_turn)


@pytest.mark.parametrize("name", MROPE)
def test_second_turn_with_mrope_needs_positions_for_images(name: str) -> None:
    tiny, model = TINY[name], TINY[name].build()
    inputs, cache = tiny.inputs(model), fresh(model)
    first = generate(model, inputs, **passed(cache)).sequences
    turn = tiny.second_turn(model, inputs, first, with_image=True)
    del turn["position_ids"]
    if NEWEST:
        with pytest.raises(StopIteration):
            generate(model, turn, **passed(cache))
        return
    second = generate(model, turn, **passed(cache))
    whole = [generate(model, row) for row in tiny.whole(model, tiny.rows(model), first, True)]
    assert max(differences(second, whole)) > 0.05


@pytest.mark.parametrize("name", MROPE)
def test_mrope_deltas_of_another_prompt_spoil_a_second_turn(name: str) -> None:
    tiny, model = TINY[name], TINY[name].build()
    inputs, cache = tiny.inputs(model), fresh(model)
    first = generate(model, inputs, **passed(cache)).sequences
    whole = [generate(model, row) for row in tiny.whole(model, tiny.rows(model), first)]
    generate(model, tiny.inputs(model, [2]))  # leaves its own rope_deltas on the model
    second = generate(model, tiny.second_turn(model, inputs, first), **passed(cache))
    assert max(differences(second, whole)) > EXACT


@pytest.mark.parametrize(("name", "video"), CASES)
def test_chunked_prefill(name: str, video: bool) -> None:
    tiny, model = TINY[name], TINY[name].build()
    inputs = tiny.inputs(model, [1, 2], video=video)
    expected = tiny.stock.chunked_video if video else tiny.stock.chunked_prefill
    whole = generate(model, inputs)
    try:
        chunked = generate(model, inputs, prefill_chunk_size=8)
    except (RuntimeError, TypeError, KeyError):  # m-RoPE in 5.17; Ovis2 and Llama 4 in 5.23
        assert not expected
        return
    assert (max_difference(chunked.logits[0], whole.logits[0]) < EXACT) == expected


@pytest.mark.parametrize(("name", "video"), CASES)
def test_expanded_rows_keep_their_images(name: str, video: bool) -> None:
    """``num_return_sequences`` and beam search repeat the rows, and have to repeat their images along."""
    tiny, model = TINY[name], TINY[name].build()
    limit = tiny.stock.expanded_videos if video else tiny.stock.expanded_images
    if limit == 0:
        pytest.skip("stock generate repeats the images in the wrong order")
    rows = {1: [1, 1], ANY: [2, 1, 0]}[limit]
    inputs = tiny.inputs(model, rows, video=video)
    greedy = generate(model, inputs).sequences
    twice = generate(model, inputs, num_return_sequences=2, do_sample=True, top_k=1).sequences
    assert torch.equal(twice, greedy.repeat_interleave(2, dim=0))
    beams = generate(model, inputs, num_beams=2).sequences
    for index, row in enumerate(tiny.rows(model, rows, video=video)):
        assert torch.equal(generate(model, row, num_beams=2).sequences[0, -4:], beams[index, -4:])
