# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the projector and the text model learn to answer, on top of the frozen vision tower."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from plphp.evaluation.tasks.synthetic import scenes
from training import checkpoints, optim, rows, tokenizer
from training import model as models

logger = logging.getLogger("training.text")


@dataclass(frozen=True)
class Shape:
    """What the rows of a batch hold: kinds of scenes, images per row, and how many rows and blocks.

    Every shape is compiled by itself, so there are few. Reading the images is most of a row's cost: a row has as many
    blocks as there are questions to ask about them.
    """

    kinds: tuple[scenes.Kind, ...]
    images: int
    rows: int
    blocks: int


GRID = Shape(("grid",), 1, 8, 6)
PAGE = Shape(("text", "text", "table"), 1, 12, 3)
ANY: tuple[scenes.Kind, ...] = ("grid", "grid", "grid", "text", "table", "table")
SEVERAL = (Shape(ANY, 2, 6, 5), Shape(ANY, 3, 5, 5), Shape(ANY, 4, 4, 5))
NUMBERING = 0.3
"""Weight of the numbering's loss, see `training.model.AnswerLoss`."""
AVERAGED = 0.995
"""Decay of the running mean of the weights, which is what is exported: it does better on layouts that are not shown."""
CHECKPOINT = "text.pt"


def draw_shape(rng: random.Random, progress: float) -> Shape:
    """Return the shape of a batch at a progress from 0 to 1.

    None has several images at first: single images are learned sooner, and carry over.
    """
    several = 0.0 if progress < 0.3 else 0.4 if progress < 0.6 else 0.55
    if rng.random() < several:
        return rng.choice(SEVERAL)
    return GRID if rng.random() < 0.65 else PAGE


def largest(progress: float) -> int:
    """Return how many rows and columns a grid may have: looking things up by place is learned on small ones."""
    return 3 if progress < 0.12 else 4 if progress < 0.25 else 5


class _Stream(IterableDataset):
    """Packed batches from a step on, each drawn from its own seed: a resumed run reads what it would have."""

    def __init__(self, seed: int, first: int, steps: int) -> None:
        self.seed, self.first, self.steps = seed, first, steps

    def __iter__(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        torch.set_num_threads(1)
        for step in range(self.first, self.steps):
            rng = random.Random(f"{self.seed}-{step}")
            progress = step / self.steps
            shape = draw_shape(rng, progress)
            made = [
                rows.make_row(rng, shape.images, shape.blocks, largest(progress), shape.kinds)
                for _ in range(shape.rows)
            ]
            pixels = torch.from_numpy(np.concatenate([row.pixels for row in made]))
            stacked = [
                np.stack([getattr(row, name) for row in made])
                for name in ("ids", "labels", "numbers", "blocks", "positions")
            ]
            yield shape.images, [pixels, *map(torch.from_numpy, stacked)]


def _sample_pixels(n: int) -> torch.Tensor:
    """Return pixels of ``n`` training scenes, to measure the spread of the tower's output."""
    rng = random.Random(77)
    drawn = [scenes.make_scenes(rng, "train", 1)[0] for _ in range(n)]
    return torch.from_numpy(np.stack([scenes.training_pixels(rng, scene) for scene in drawn]))


def prepare(model, vision: Path, seed: int = 0) -> None:
    """Load and freeze the tower that was pre-trained with a seed, and initialise the projector on its output."""
    saved = checkpoints.load(vision, seed, model.device)
    model.model.vision_tower.load_state_dict(saved["tower"])
    model.model.vision_tower.requires_grad_(False)
    head = models.PatchHead(model.config.vision_config.hidden_size).to(model.device)
    head.load_state_dict(saved["head"])
    with torch.no_grad():
        features = models.vision_features(model, _sample_pixels(600).to(model.device)).flatten(0, 1)
    models.start_projector(model, head, features, tokenizer.attribute_words())


def _factor(progress: float, step: int, warm_up: int = 150) -> float:
    """Return the learning-rate factor: warm-up in steps, then a cosine over the progress."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.05) / 0.95)))
    return min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * cosine)


def train(
    model,
    out: Path,
    *,
    steps: int,
    seed: int = 0,
    resume: bool = False,
    compiled: bool = True,
    every: float = 120,
) -> dict[str, float]:
    """Train for ``steps`` batches, all runs together.

    Parameters
    ----------
    model
        Prepared by ``prepare``; changed in place.
    out
        Folder for ``text.pt`` (the checkpoint) and ``log.jsonl`` (the curves).
    steps
        Length of the schedule.
    seed
        Of the data.
    resume
        Continue from ``out / "text.pt"``.
    compiled
        Compile the forward and backward passes.
    every
        Seconds between checkpoints.

    Returns
    -------
    dict
        Steps, rows and seconds spent.
    """
    tower = models.Encoder(model)
    loss_fn = models.AnswerLoss(model, tokenizer.NUMBERS)
    forward = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn
    optimizers = optim.make([loss_fn], muon=3e-3, adamw=1.5e-3, weight_decay=0.05)
    trainable = [p for p in loss_fn.parameters() if p.requires_grad]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGED))
    checkpoint = out / CHECKPOINT
    first, row_count, before = 0, 0, 0.0
    if resume and checkpoint.exists():
        state = checkpoints.load(checkpoint, seed, model.device)
        model.load_state_dict(state["model"])
        model.tie_weights()
        average.module.load_state_dict(state["average"])
        average.n_averaged.fill_(state["step"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, row_count, before = state["step"], state["rows"], state["seconds"]
        logger.info("resumed at step %d, %.1f minutes", first, before / 60)
    stream = DataLoader(_Stream(seed + 1000, first, steps), batch_size=None, num_workers=1, prefetch_factor=4)
    start = last_log = last_save = time.monotonic()
    window: dict[str, list[tuple[float, float]]] = {"one": [], "several": []}

    def save(step: int) -> None:
        checkpoints.save(
            checkpoint,
            model=model.state_dict(),
            average=average.module.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            step=step,
            rows=row_count,
            seconds=before + time.monotonic() - start,
            steps=steps,
            seed=seed,
        )

    for step, (n, batch) in enumerate(stream, start=first):
        pixels, ids, labels, numbers, blocks, positions = (one.to(model.device) for one in batch)
        optim.set_rate(optimizers, _factor(step / steps, step))
        structure = models.Structure.of(blocks, rows.prefix_length(n), rows.WIDTH, torch.bfloat16)
        with torch.autocast(model.device.type, torch.bfloat16):
            with torch.no_grad():
                features = tower(pixels)
            loss, right, numbering = forward(features, ids, labels, numbers, positions, structure)
        (loss + NUMBERING * numbering).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optim.step(optimizers)
        average.update_parameters(model)
        row_count += len(ids)
        window["one" if n == 1 else "several"].append((loss.item(), right.item()))
        now = time.monotonic()
        if now - last_log > 20 or step + 1 == steps:
            last_log = now
            record = {"seconds": round(before + now - start), "step": step + 1, "rows": row_count}
            record["numbering"] = round(numbering.item(), 4)
            for name, values in window.items():
                if values:
                    mean = np.mean(values, axis=0)
                    record[name] = {"loss": round(float(mean[0]), 4), "right": round(float(mean[1]), 4)}
                values.clear()
            logger.info("%s", record)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        if now - last_save > every:
            last_save = now
            save(step + 1)
    save(steps)
    return {"steps": steps, "rows": row_count, "seconds": before + time.monotonic() - start}
