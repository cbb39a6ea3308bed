# SPDX-License-Identifier: Apache-2.0
"""Scores of patches arrive at the tokens that the patches become, and nowhere else, in every family."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plphp.engines.hf.tower_layers import core_of
from plphp.engines.hf.tower_recording import recorded_tower
from plphp.engines.hf.tower_scores import token_scores
from plphp.errors import SpanError, UnsupportedFeatureError
from plphp.families.registry import FAMILIES_BY_NAME, family_of
from plphp.families.spans import find_spans
from plphp.families.towers import VisionTower
from precision import assert_exact
from tiny_models import TINY, collate, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

WITHOUT_MAP = {"idefics2"}
NAMES = sorted(TINY.keys() - WITHOUT_MAP)
CASES = [(name, video) for name in NAMES for video in (False, True) if not video or TINY[name].videos is not None]
NEWLINES = {"llava-next", "llava-next-video", "llava-onevision"}


def tower_of(model: Any) -> VisionTower:
    tower = family_of(model.config).tower
    assert tower is not None
    return tower


def patch_scores(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad(), recorded_tower(model) as record:
        model(**inputs)
    return [run.received[0] for run in record.passes]


def flat(scores: tuple[tuple[Tensor, ...], ...]) -> Tensor:
    return torch.cat([image for row in scores for image in row])


def in_prompt(model: Any, inputs: dict[str, Any], values: Tensor) -> Tensor:
    """Bring values [tokens, ...] in the order of the features into that of the prompt, image by image."""
    spans = find_spans(family_of(model.config), model.config, inputs)
    ids = torch.tensor(family_of(model.config).vision_token_ids(model.config))
    places = torch.isin(inputs["input_ids"], ids)
    order = torch.full(places.shape, -1)
    order[places] = torch.arange(len(values))
    rows = [
        order[row][numbers == image]
        for row, numbers in enumerate(spans.segment)
        for image in range(len(spans.grids[row]))
    ]
    return values[torch.cat(rows)]


@contextmanager
def frozen(model: Any, leaves: list[Tensor]) -> Iterator[None]:
    """Put a leaf, kept in ``leaves``, in the place of what the patches of the tower become."""
    assert tower_of(model).patches is not None
    module = core_of(model).get_submodule(tower_of(model).patches)

    def leaf(hidden: Tensor) -> Tensor:
        if not leaves:
            leaves.append(hidden.detach().clone().requires_grad_())
        return leaves[0]

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return leaf(output)
        last = leaf(output.last_hidden_state)
        hidden_states = output.get("hidden_states")
        changed = copy.copy(output)
        changed["last_hidden_state"] = last
        if hidden_states is not None:
            changed["hidden_states"] = tuple(last if h is not None else None for h in hidden_states)
        return changed

    with (module[-1] if isinstance(module, nn.ModuleList) else module).register_forward_hook(replace):
        yield


def embedded(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The embeddings of the prompt that the text model is given, [batch, seq, hidden]."""
    seen: list[Tensor] = []

    class StopError(Exception):
        pass

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0])
        raise StopError

    text = next(part for name, part in core_of(model).named_children() if name in ("language_model", "text_model"))
    with text.register_forward_pre_hook(stop, with_kwargs=True), pytest.raises(StopError):
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize(("name", "video"), CASES)
def test_a_token_has_the_scores_of_the_patches_that_it_depends_on(name: str, video: bool) -> None:
    """By the Jacobian of the model: features of patches to embeddings of tokens."""
    model = tiny_model(name)
    inputs = TINY[name].inputs(model, [1], video=video)
    (scores,) = patch_scores(model, inputs)
    leaves: list[Tensor] = []
    with frozen(model, leaves):
        embeddings = embedded(model, inputs)
    spans = find_spans(family_of(model.config), model.config, inputs)
    direction = torch.linspace(0.3, 1.7, embeddings.shape[-1]).to(embeddings).cos()
    rows = [
        row[numbers == image]
        for row, numbers, grids in zip(embeddings, spans.segment, spans.grids, strict=True)
        for image in range(len(grids))
    ]
    tokens = torch.cat(rows) @ direction
    depends = []
    for token in tokens:
        gradient = torch.autograd.grad(token, leaves[0], retain_graph=True, allow_unused=True)[0]
        depends.append(torch.zeros(scores.numel()) if gradient is None else gradient.abs().amax(-1).flatten())
    jacobian = torch.stack(depends) > 1e-12
    position = tower_of(model).class_token(model.config)
    if position is not None:
        assert not jacobian.view(len(tokens), *scores.shape)[:, :, position].any()
    carried = torch.zeros(jacobian.shape).double()
    constant = flat(token_scores(model, inputs, [torch.ones_like(scores)]))
    for patch in range(scores.numel()):
        single = torch.zeros(scores.numel()).to(scores)
        single[patch] = 1
        carried[:, patch] = flat(token_scores(model, inputs, [single.view_as(scores)]))
    behind_none = ~jacobian.any(1)
    assert torch.equal(carried[~behind_none] > 1e-12, jacobian[~behind_none])
    assert (constant[behind_none] == math.inf).all()
    assert behind_none.any() == (name in NEWLINES and not (video and name == "llava-next-video"))
    assert_exact(constant[~behind_none], torch.ones_like(constant[~behind_none]))
    assert_exact(carried[~behind_none].sum(1), torch.ones(int((~behind_none).sum())).double())


@pytest.mark.parametrize(("name", "video"), CASES)
def test_images_of_a_batch_have_their_own_scores(name: str, video: bool) -> None:
    """Rows of several lengths, images of several sizes: each image as in a prompt of its own."""
    model = tiny_model(name)
    counts = [2, 1] if video else [2, 1, 0]
    inputs = TINY[name].inputs(model, counts, video=video)
    rows = token_scores(model, inputs, patch_scores(model, inputs))
    spans = find_spans(family_of(model.config), model.config, inputs)
    assert [len(row) for row in rows] == [len(grids) for grids in spans.grids]
    for row, alone in zip(rows, TINY[name].rows(model, counts, video=video), strict=True):
        if not row:
            continue
        (expected,) = token_scores(model, alone, patch_scores(model, alone))
        for image, of_image in zip(row, expected, strict=True):
            known = of_image < math.inf
            assert torch.equal(image < math.inf, known)
            assert_exact(image[known], of_image[known])
    assert torch.equal(flat(rows).isnan(), torch.zeros(len(flat(rows)), dtype=torch.bool))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.own_dtype
def test_scores_keep_their_precision(name: str) -> None:
    """A model in bfloat16 hands on the scores in float32, under autocast too, and is as it was."""
    model, small = TINY[name].build(), TINY[name].build(dtype=torch.bfloat16)
    inputs, of_small = TINY[name].inputs(model, [2, 1]), TINY[name].inputs(small, [2, 1])
    before = copy.deepcopy(small.state_dict())
    scores = [part + 1 for part in patch_scores(model, inputs)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = flat(token_scores(small, of_small, scores))
    assert actual.dtype is torch.float32
    assert torch.equal(actual, flat(token_scores(model, inputs, scores)))
    assert all(torch.equal(weight, small.state_dict()[key]) for key, weight in before.items())


def both(name: str) -> dict[str, Any]:
    """A prompt of an image and a prompt of a video, in a batch."""
    model = tiny_model(name)
    video, image = TINY[name].inputs(model, [1], video=True), TINY[name].inputs(model, [1], text=(7, 5))
    tokens = {key for key in image if key in video}
    batch = collate([{key: part[key] for key in tokens} for part in (video, image)])
    return {**image, **video, **batch}


@pytest.mark.parametrize("name", ["llava-next-video", "llava-onevision", "qwen2-vl", "qwen3-vl"])
def test_images_and_videos_of_a_batch(name: str) -> None:
    """Images are the first pass of the tower, whatever comes first in the prompt."""
    model, inputs = tiny_model(name), both(name)
    scores = patch_scores(model, inputs)
    assert len(scores) == 2
    actual = token_scores(model, inputs, scores)
    video, image = TINY[name].inputs(model, [1], video=True), TINY[name].inputs(model, [1], text=(7, 5))
    for row, alone in zip(actual, (video, image), strict=True):
        (expected,) = token_scores(model, alone, patch_scores(model, alone))
        row_scores, own = torch.cat(row), torch.cat(expected)
        assert torch.equal(row_scores == math.inf, own == math.inf)
        assert_exact(row_scores[own < math.inf], own[own < math.inf])


@pytest.mark.parametrize("name", NAMES)
def test_scores_inside_of_a_recording(name: str) -> None:
    """The tower does not run again, so the record goes on as if nothing was."""
    model = tiny_model(name)
    inputs = TINY[name].inputs(model, [1])
    keys = [sorted(part.__dict__) for part in model.modules()]
    runs: list[None] = []
    module = core_of(model).get_submodule(tower_of(model).module)
    with torch.no_grad(), recorded_tower(model) as record:
        model(**inputs)
        with module.register_forward_hook(lambda *args: runs.append(None)):
            token_scores(model, inputs, [record.passes[0].received[0]])
        assert len(record.passes) == 1
    assert runs == []
    assert [sorted(part.__dict__) for part in model.modules()] == keys


def test_a_later_turn() -> None:
    tiny, model = TINY["qwen2-vl"], tiny_model("qwen2-vl")
    first = tiny.inputs(model, [1])
    with torch.no_grad():
        output = model.generate(**first, max_new_tokens=3, do_sample=False)
    turn = tiny.second_turn(model, first, output, with_image=True)
    features = {key: value for key, value in turn.items() if not key.endswith("_ids") and key != "attention_mask"}
    alone = tiny.inputs(model, [1], seed=1)
    scores = torch.arange(len(turn["pixel_values"])).double()[None]
    ((image,),) = token_scores(model, turn, [scores], past_length=output.shape[1] - 1)
    assert features.keys() == {"pixel_values", "image_grid_thw"}
    assert image.shape == (len(turn["pixel_values"]) // 4,)
    assert_exact(image.double(), scores.view(-1, 4).mean(1))
    assert alone["pixel_values"].shape[1] == turn["pixel_values"].shape[1]


def test_grids_are_the_images() -> None:
    """Row by row, for every family whose towers hold patches row by row."""
    of_rows = {"llava", "llava-pixtral", "mistral3", "internvl", "idefics3", "aya-vision", "ovis2", "llama4", "gemma3"}
    for name in sorted(of_rows & TINY.keys()):
        model = tiny_model(name)
        inputs = TINY[name].inputs(model, [1])
        spans = find_spans(family_of(model.config), model.config, inputs)
        (scores,) = patch_scores(model, inputs)
        position = tower_of(model).class_token(model.config)
        grid = spans.token_grid(0, 0)
        assert grid is not None
        images, count = scores.shape
        patches = count - (position is not None)
        factor = math.isqrt(patches // math.prod(grid))
        columns = grid[1] * factor
        heights = torch.arange(patches) // columns
        if position is not None:
            heights = torch.cat(
                [heights[:0] - 1, torch.tensor([-9]), heights] if position == 0 else [heights, torch.tensor([-9])]
            )
        ((first, *_),) = token_scores(model, inputs, [heights.double().expand(images, -1)])
        plane = first.view(grid)
        assert torch.equal(plane, plane[:, :1].expand(grid)), name
        assert (plane.diff(dim=0) > 0).all(), name


def test_tokens_without_a_grid() -> None:
    model = tiny_model("llava-next")
    spans = find_spans(family_of(model.config), model.config, TINY["llava-next"].inputs(model, [1]))
    assert spans.token_grid(0, 0) is None
    model = tiny_model("qwen2-vl")
    spans = find_spans(family_of(model.config), model.config, TINY["qwen2-vl"].inputs(model, [1], video=True))
    grid = spans.grids[0][0]
    assert grid is not None
    assert spans.token_grid(0, 0) == (grid[0] * grid[1], grid[2])


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("idefics2")
    inputs = TINY["idefics2"].inputs(model, [1])
    with pytest.raises(UnsupportedFeatureError, match="'idefics2' a resampler mixes"):
        token_scores(model, inputs, patch_scores(model, inputs))
    model = tiny_model("llava")
    inputs = TINY["llava"].inputs(model, [2])
    (scores,) = patch_scores(model, inputs)
    with pytest.raises(SpanError, match="Expected scores of 1 passes"):
        token_scores(model, inputs, [scores, scores])
    with pytest.raises(SpanError, match="Expected scores of 0 passes of the vision tower, for no images"):
        token_scores(model, {"input_ids": torch.tensor([[5, 6]])}, [scores])
    with pytest.raises(SpanError, match="holds 32 vision tokens for pixel_values, but the patches fill 16"):
        token_scores(model, inputs, [scores[:1]])
    model = tiny_model("internvl")
    inputs = TINY["internvl"].inputs(model, [1])
    with pytest.raises(SpanError, match="do not fit pixel_values"):
        token_scores(model, inputs, [patch_scores(model, inputs)[0][:, :-3]])
    unknown = dataclasses.replace(family_of(model.config), tower=None)
    monkeypatch.setitem(FAMILIES_BY_NAME.registered, "internvl", unknown)
    with pytest.raises(UnsupportedFeatureError, match="does not know the vision tower"):
        token_scores(model, inputs, [scores])
