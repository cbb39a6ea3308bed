# SPDX-License-Identifier: Apache-2.0
"""Model: a packed row scores as its questions would alone, and one small model learns in a few steps."""

from __future__ import annotations

import random

import numpy as np
import torch

from training import export, model, optim, rows


def _batch(made: list[rows.Row]) -> list[torch.Tensor]:
    names = ("ids", "labels", "blocks", "positions")
    return [torch.from_numpy(np.stack([getattr(row, name) for row in made])) for name in names]


def test_blocks_see_the_prefix_and_themselves_only() -> None:
    net = export.new_model(small=True).eval()
    row = rows.make_row(random.Random(2), 1, 120)
    start = rows.prefix_length(1)
    with torch.no_grad():
        features = model.vision_features(net, torch.from_numpy(row.pixels))
        packed, _ = model.AnswerLoss(net)(features, *_batch([row]), start - 1)
        total, count = 0.0, 0
        for block in range(1, int(row.blocks.max()) + 1):
            at = (row.blocks == 0) | (row.blocks == block)
            ids = torch.from_numpy(row.ids[at])[None]
            pixels = torch.from_numpy(row.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            logits = net(input_ids=ids, pixel_values=pixels).logits[0]
            labels = torch.from_numpy(row.labels[at])
            scored = labels >= 0
            total += torch.nn.functional.cross_entropy(logits[scored], labels[scored], reduction="sum").item()
            count += int(scored.sum())
    assert packed.item() == np.float32(total / count).item() or abs(packed.item() - total / count) < 1e-4


def test_a_few_steps_reduce_the_loss() -> None:
    net = export.new_model(small=True)
    net.model.vision_tower.requires_grad_(False)
    loss_fn = model.AnswerLoss(net)
    optimizers = optim.make([loss_fn], muon=3e-3, adamw=3e-3, weight_decay=0.0)
    row = rows.make_row(random.Random(3), 1, 100)
    batch, losses = _batch([row]), []
    features = model.vision_features(net, torch.from_numpy(row.pixels)).detach()
    for _ in range(8):
        loss, _ = loss_fn(features, *batch, rows.prefix_length(1) - 1)
        loss.backward()
        optim.step(optimizers)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
