# SPDX-License-Identifier: Apache-2.0
"""Model: a packed row scores as its questions would alone, and one small model learns in a few steps."""

from __future__ import annotations

import dataclasses
import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from plphp.evaluation import available_tasks
from plphp.evaluation.tasks.synthetic import scenes
from precision import EXACT
from training import export, model, optim, rows, tokenizer, train

BLOCKS = 3


def _batch(made: list[rows.Row], images: int, dtype: torch.dtype = torch.float32) -> tuple:
    ids, labels, numbers, blocks, positions = (
        torch.from_numpy(np.stack([getattr(row, name) for row in made]))
        for name in ("ids", "labels", "numbers", "blocks", "positions")
    )
    structure = model.Structure.of(blocks, rows.prefix_length(images), rows.WIDTH, dtype)
    return ids, labels, numbers, positions, structure


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("images", [1, 2])
def test_conversations_see_the_prefix_and_themselves_only(images: int) -> None:
    net = export.new_model(small=True).eval().double()
    row = rows.make_row(random.Random(5), images, BLOCKS)
    with torch.no_grad():
        features = model.vision_features(net, torch.from_numpy(row.pixels))
        packed, *_ = model.AnswerLoss(net, tokenizer.NUMBERS)(features, *_batch([row], images, torch.float64))
        net.set_attn_implementation("sdpa")
        pixels = torch.from_numpy(row.pixels).permute(0, 3, 1, 2).double() / 127.5 - 1
        total, count = 0.0, 0
        for conversation in range(1, int(row.blocks.max()) + 1):
            at = (row.blocks == 0) | (row.blocks == conversation)
            logits = net(input_ids=torch.from_numpy(row.ids[at])[None], pixel_values=pixels).logits[0]
            labels = torch.from_numpy(row.labels[at])
            scored = labels >= 0
            total += torch.nn.functional.cross_entropy(logits[scored], labels[scored], reduction="sum").item()
            count += int(scored.sum())
    assert row.blocks.max() > BLOCKS  # several conversations share a block
    assert packed.item() == pytest.approx(total / count, abs=EXACT)


def test_the_numbering_asks_for_the_numbers_of_the_row() -> None:
    net = export.new_model(small=True)
    loss_fn = model.AnswerLoss(net, tokenizer.NUMBERS)
    row = rows.make_row(random.Random(4), 3, BLOCKS)
    numbers = torch.from_numpy(row.numbers)[None]
    known = torch.nn.functional.normalize(net.get_input_embeddings().weight, dim=-1)[list(tokenizer.NUMBERS)]
    hidden = 1000 * known[numbers.clamp(min=0)]
    with torch.no_grad():
        assert loss_fn(model.vision_features(net, torch.from_numpy(row.pixels)), *_batch([row], 3))[2] > 1
        assert loss_fn._numbering(hidden, numbers) < 0.01
        assert loss_fn._numbering(hidden, numbers.where(numbers < 0, (numbers + 1) % 4)) > 1
        assert loss_fn._numbering(hidden, torch.full_like(numbers, -100)) == 0


def test_weights_are_saved_with_the_names_that_vllm_reads(tmp_path: Path) -> None:
    net = export.new_model(small=True)
    export.save(net, tmp_path)
    names = list(load_file(tmp_path / "model.safetensors"))
    assert all(name.startswith("vision_tower.vision_model.") for name in names if "vision" in name)
    loaded, told = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    weights = net.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


def test_a_few_steps_reduce_the_loss() -> None:
    net = export.new_model(small=True)
    net.model.vision_tower.requires_grad_(False)
    loss_fn = model.AnswerLoss(net, tokenizer.NUMBERS)
    optimizers = optim.make([loss_fn], muon=3e-3, adamw=3e-3, weight_decay=0.0)
    row = rows.make_row(random.Random(3), 1, BLOCKS)
    batch, losses = _batch([row], 1), []
    features = model.vision_features(net, torch.from_numpy(row.pixels)).detach()
    for _ in range(8):
        loss, *_ = loss_fn(features, *batch)
        loss.backward()
        optim.step(optimizers)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_patch_starts_near_the_words_for_what_it_shows() -> None:
    net = export.new_model()
    head = model.PatchHead(net.config.vision_config.hidden_size)
    features = torch.randn(500, net.config.vision_config.hidden_size)
    model.start_projector(net, head, features, tokenizer.attribute_words())
    embeddings = net.get_input_embeddings().weight
    star = list(scenes.OBJECTS).index("star")
    # features that the head takes for a star
    direction = head.linear.weight[star] - head.linear.weight.mean(0)
    shown = features.mean(0) + 60 * torch.nn.functional.normalize(direction, dim=0)
    with torch.no_grad():
        near = torch.nn.functional.normalize(embeddings, dim=-1) @ net.model.multi_modal_projector(shown[None])[0]
    words = [token for token in tokenizer.attribute_words() if token is not None]
    assert words[int(near[words].argmax())] == tokenizer.encode(" star")[0]


def test_every_number_of_images_that_a_task_asks_about_is_trained() -> None:
    trained = {shape.images for shape in (train.GRID, train.PAGE, *train.SEVERAL)}
    assert trained >= {images for task in available_tasks().values() for images in task.images}


def test_the_running_mean_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, mean = (export.new_model(seed, small=True) for seed in (0, 1))
    states = {"model": net.state_dict(), "average": mean.state_dict()}
    torch.save(states, tmp_path / train.CHECKPOINT)
    monkeypatch.setattr(export, "new_model", functools.partial(export.new_model, small=True))
    folder = export.export(tmp_path, tmp_path / "model")
    read = type(net).from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(read[name], weight.bfloat16()) for name, weight in mean.state_dict().items())


def test_a_resumed_run_learns_what_it_would_have_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        net = export.new_model(small=True)
        net.model.vision_tower.requires_grad_(False)
        (tmp_path / folder).mkdir(exist_ok=True)
        train.train(net, tmp_path / folder, steps=3, compiled=False, every=0, **settings)
        state = torch.load(tmp_path / folder / train.CHECKPOINT, weights_only=True)
        assert not torch.equal(state["average"]["lm_head.weight"], state["model"]["lm_head.weight"])
        return {**state["model"], **{f"average.{name}": weight for name, weight in state["average"].items()}}

    monkeypatch.setattr(train, "GRID", dataclasses.replace(train.GRID, rows=2, blocks=2))
    monkeypatch.setattr(train, "PAGE", dataclasses.replace(train.PAGE, rows=2, blocks=2))
    whole = run("whole")
    with monkeypatch.context() as cut:
        steps = iter(range(3))
        step = optim.step

        def stop(optimizers: Any) -> None:
            if next(steps) == 2:
                raise KeyboardInterrupt
            step(optimizers)

        cut.setattr(optim, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert torch.load(tmp_path / "cut" / train.CHECKPOINT, weights_only=True)["step"] == 2
    resumed = run("cut", resume=True)
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())
    with pytest.raises(ValueError, match=r"seed 0, got 7: give that seed"):
        run("cut", resume=True, seed=7)
