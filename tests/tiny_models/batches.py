# SPDX-License-Identifier: Apache-2.0
"""From the inputs of rows to the inputs of a batch, as the processors collate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Inputs [batch, seq]; all further inputs belong to images."""


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Left-pad the inputs of tokens and join the inputs of images."""
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name in PER_TOKEN:
            parts = [pad(part, (length - part.shape[1], 0)) for part in parts]
        batch[name] = join(parts)
    return batch


def drop_empty(inputs: dict[str, Any]) -> dict[str, Any]:
    """Leave out the tensors of images where there are none: then the processors do not return them."""
    present = {name: value for name, value in inputs.items() if value.numel()}
    if not any(name.startswith("pixel_values") for name in present):
        return {name: value for name, value in present.items() if name in (*PER_TOKEN, "position_ids")}
    return present


def cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Cast the floating-point tensors, as a user does before ``generate``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first axis; the further axes grow to the largest size, with zeros."""
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    joined = parts[0].new_zeros(sum(len(part) for part in parts), *shape)
    start = 0
    for part in parts:
        joined[(slice(start, start + len(part)), *(slice(size) for size in part.shape[1:]))] = part
        start += len(part)
    return joined
