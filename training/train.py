# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the projector and the text model learn to answer, on top of the frozen vision tower."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from training import model as models
from training import optim, rows, scenes

logger = logging.getLogger("training.text")

# Images per prompt -> (rows per batch, text tokens per row): about the same number of tokens in every batch.
SHAPES = {1: (18, 224), 2: (12, 160), 3: (9, 160), 4: (7, 160)}
CHECKPOINT = "text.pt"


def several_images(progress: float) -> float:
    """Return the share of batches with several images at a progress from 0 to 1.

    None at first; more at the end, when single images are learned and several still lag.
    """
    if progress < 0.1:
        return 0.0
    return 0.35 if progress < 0.75 else 0.55


class _Stream(IterableDataset):
    """Endless packed batches; what they hold follows the training's progress."""

    def __init__(self, seed: int, progress) -> None:
        self.seed, self.progress = seed, progress

    def __iter__(self) -> Iterator[tuple[int, list[torch.Tensor]]]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        while True:
            progress = self.progress.value
            n = rng.choice((2, 2, 3, 4)) if rng.random() < several_images(progress) else 1
            count, slot = SHAPES[n]
            made = [rows.make_row(rng, n, slot, easy=progress < 0.08) for _ in range(count)]
            pixels = torch.from_numpy(np.concatenate([row.pixels for row in made]))
            stacked = [
                np.stack([getattr(row, name) for row in made]) for name in ("ids", "labels", "blocks", "positions")
            ]
            yield n, [pixels, *map(torch.from_numpy, stacked)]


def _sample_pixels(n: int) -> torch.Tensor:
    """Return pixels of ``n`` training scenes, to measure the spread of the tower's output."""
    rng = random.Random(77)
    drawn = [scenes.make_scenes(rng, "train", 1)[0] for _ in range(n)]
    return torch.from_numpy(np.stack([scenes.training_pixels(rng, scene) for scene in drawn]))


def prepare(model, vision: Path) -> None:
    """Load and freeze the pre-trained tower and initialise the projector on its output."""
    model.model.vision_tower.load_state_dict(torch.load(vision, weights_only=True)["tower"])
    model.model.vision_tower.requires_grad_(False)
    with torch.no_grad():
        features = models.vision_features(model, _sample_pixels(600)).flatten(0, 1)
    models.whiten_projector(model, features)


def _factor(progress: float, step: int, warm_up: int = 150) -> float:
    """Return the learning-rate factor: warm-up in steps, then a cosine over the progress."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.05) / 0.95)))
    return min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * cosine)


def _save(path: Path, **state) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    model,
    out: Path,
    *,
    minutes: float,
    seed: int = 0,
    resume: bool = False,
    compiled: bool = True,
    every: float = 120,
) -> dict[str, float]:
    """Train until ``minutes`` of training time are spent, all runs together.

    The schedule follows the share of the time that is spent, so a run that is resumed with fewer minutes ends
    sooner and properly annealed.

    Parameters
    ----------
    model
        Prepared by ``prepare``; changed in place.
    out
        Folder for ``text.pt`` (the checkpoint) and ``log.jsonl``.
    minutes
        Length of the schedule.
    seed
        Of the data stream.
    resume
        Continue from ``out / "text.pt"``.
    compiled
        Compile the forward pass.
    every
        Seconds between checkpoints.

    Returns
    -------
    dict
        Steps, rows and seconds spent.
    """
    tower = models.Encoder(model)
    loss_fn = models.AnswerLoss(model)
    forward = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn
    optimizers = optim.make([loss_fn], muon=3e-3, adamw=1.5e-3, weight_decay=0.05)
    trainable = [p for p in loss_fn.parameters() if p.requires_grad]
    checkpoint = out / CHECKPOINT
    step, row_count, spent = 0, 0, 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        model.tie_weights()
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, row_count, spent = state["step"], state["rows"], state["seconds"]
        logger.info("resumed at step %d, %.1f minutes", step, spent / 60)
    total = minutes * 60
    progress = multiprocessing.Value("d", spent / total)
    stream = DataLoader(_Stream(seed + 1000 + step, progress), batch_size=None, num_workers=1, prefetch_factor=4)
    batches = iter(stream)
    log = (out / "log.jsonl").open("a")
    start = last_log = last_save = time.monotonic()
    before = spent
    window: dict[str, list[tuple[float, float]]] = {"one": [], "several": []}

    def save() -> None:
        _save(
            checkpoint,
            model=model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            step=step,
            rows=row_count,
            seconds=spent,
            minutes=minutes,
        )

    while True:
        spent = before + time.monotonic() - start
        done = spent / total
        if done >= 1:
            break
        progress.value = done
        optim.set_rate(optimizers, _factor(done, step))
        n, (pixels, ids, labels, blocks, positions) = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = tower(pixels)
            # Only the most frequent shape is worth its compile time.
            loss, right = (forward if n == 1 else loss_fn)(
                features, ids, labels, blocks, positions, rows.prefix_length(n) - 1
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optim.step(optimizers)
        step, row_count = step + 1, row_count + len(ids)
        window["one" if n == 1 else "several"].append((loss.item(), right.item()))
        now = time.monotonic()
        if now - last_log > 20:
            last_log = now
            record = {"seconds": round(spent), "step": step, "rows": row_count}
            for name, values in window.items():
                if values:
                    mean = np.mean(values, axis=0)
                    record[name] = {"loss": round(float(mean[0]), 4), "right": round(float(mean[1]), 4)}
                values.clear()
            logger.info("%s", record)
            log.write(json.dumps(record) + "\n")
            log.flush()
        if now - last_save > every:
            last_save = now
            save()
    save()
    log.close()
    return {"steps": step, "rows": row_count, "seconds": spent}
