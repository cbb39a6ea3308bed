# SPDX-License-Identifier: Apache-2.0
"""Optimisers: Muon on the matrices of the layers, AdamW on the rest, one learning-rate factor for both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn


def make(
    modules: Iterable[nn.Module], *, muon: float, adamw: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return [AdamW, Muon] over the trainable parameters, with peak rates ``adamw`` and ``muon``."""
    named = {id(p): (name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.values() if p.ndim == 2 and "layers." in name]
    taken = {id(p) for p in matrices}
    rest = [(name, p) for key, (name, p) in named.items() if key not in taken]
    # The projector starts from a good place, and loses what the text model does not read yet if it moves fast.
    projector = [p for name, p in rest if "projector" in name]
    groups = [
        {"params": [p for name, p in rest if p.ndim >= 2 and "projector" not in name], "weight_decay": weight_decay},
        {"params": [p for name, p in rest if p.ndim < 2 and "projector" not in name], "weight_decay": 0.0},
    ]
    if projector:
        groups.append({"params": projector, "weight_decay": 0.0, "lr": 0.2 * adamw})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=adamw, betas=(0.9, 0.98), fused=True)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=muon, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to ``factor`` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def step(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Update the parameters and clear the gradients."""
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
