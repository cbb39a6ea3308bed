# SPDX-License-Identifier: Apache-2.0
"""Random weights under which images matter and greedy outputs vary."""

from __future__ import annotations

import math

import torch

from .tokens import seeded


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw all weights anew: unit variance through every layer, attention scores with a spread of about 2."""
    generator = seeded(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    drawn: set[int] = set()  # tied weights have several names
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim < 2 or id(weight) in drawn:
                continue
            drawn.add(id(weight))
            # Layouts of experts are (expert, in, out) or (expert, out, in).
            fan_in = weight[0].numel() if "expert" not in name else min(weight.shape[1:])
            std = 1.0 if id(weight) in embeddings else 1.0 / math.sqrt(fan_in)
            if any(key in name for key in ("q_proj", "k_proj")):
                std *= 1.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
