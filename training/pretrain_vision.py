# SPDX-License-Identifier: Apache-2.0
"""Stage 1: the vision tower learns to name what every patch shows, then it is frozen."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from plphp.evaluation.tasks.synthetic import scenes
from training import checkpoints, optim
from training import model as models

logger = logging.getLogger("training.vision")

KINDS: tuple[scenes.Kind, ...] = ("grid", "grid", "text", "text", "text", "table", "table")
"""How often the tower sees each kind of scene: to tell letters apart, and their places in a line, is learned last."""


class _Stream(IterableDataset):
    """Endless batches of (pixels, patch labels)."""

    def __init__(self, seed: int, batch: int) -> None:
        self.seed, self.batch = seed, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        while True:
            drawn = [scenes.make_scenes(rng, "train", kinds=KINDS)[0] for _ in range(self.batch)]
            pixels = np.stack([scenes.training_pixels(rng, scene) for scene in drawn])
            yield (
                torch.from_numpy(pixels),
                torch.from_numpy(np.stack([scene.patch_labels() for scene in drawn])),
            )


def pretrain(
    model, out: Path, *, steps: int, seed: int = 0, batch: int = 32, compiled: bool = False
) -> dict[str, float]:
    """Train ``model``'s vision tower on patch labels for ``steps`` batches and write ``out / "vision.pt"``.

    Returns
    -------
    dict
        Patch accuracy (fraction) by kind of scene, on the development split.
    """
    tower, device = model.model.vision_tower, model.device
    head = models.PatchHead(model.config.vision_config.hidden_size).to(device)
    optimizers = optim.make([tower, head], muon=3e-3, adamw=1.5e-3, weight_decay=0.02)
    parameters = [*tower.parameters(), *head.parameters()]
    batches = iter(DataLoader(_Stream(seed + 5, batch), batch_size=None, num_workers=1, prefetch_factor=6))

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = models.Encoder(model), head

        def forward(self, pixels, labels):
            return self.head(self.encoder(pixels), labels)

    step_fn = torch.compile(Step(), dynamic=False) if compiled else Step()
    start = last = time.monotonic()
    step, losses, rights = 0, [], []
    while step < steps:
        elapsed = time.monotonic() - start
        optim.set_rate(optimizers, min(1.0, (step + 1) / 40) * min(1.0, (1 - step / steps) / 0.5 + 0.02))
        pixels, labels = (one.to(device) for one in next(batches))
        with torch.autocast(device.type, torch.bfloat16):
            loss, right = step_fn(pixels, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optim.step(optimizers)
        step += 1
        losses.append(loss.item())
        rights.append(right.item())
        if time.monotonic() - last > 20:
            last = time.monotonic()
            logger.info(
                "%4.0f s step %d, %.0f images/s, loss %.3f, patch accuracy %.3f",
                elapsed,
                step,
                step * batch / elapsed,
                np.mean(losses),
                np.mean(rights),
            )
            losses, rights = [], []
    result = {}
    with torch.no_grad():
        rng = random.Random(seed + 9)
        for kind in ("grid", "text", "table"):
            drawn = [scenes.make_scene(rng, "dev", kind) for _ in range(200)]
            pixels = torch.from_numpy(np.stack([np.asarray(scene.draw()) for scene in drawn])).to(device)
            labels = torch.from_numpy(np.stack([scene.patch_labels() for scene in drawn])).to(device)
            result[kind] = head(models.vision_features(model, pixels), labels)[1].item()
    logger.info("held-out patch accuracy %s after %d steps", result, step)
    checkpoints.save(
        out / "vision.pt",
        tower=tower.state_dict(),
        head=head.state_dict(),
        held_out=result,
        steps=step,
        seed=seed,
        seconds=time.monotonic() - start,
    )
    return result
