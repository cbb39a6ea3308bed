# SPDX-License-Identifier: Apache-2.0
"""Codebooks say what they are of, and refuse tensors that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plphp import ConfigError
from plphp.kernels.books import Books, LayerBooks


def books(kv_heads: int = 2, dim: int = 32, **changes: Any) -> Books:
    """Of zeros."""
    tensors: dict[str, Any] = {
        "fine": torch.zeros(kv_heads, dim // 8, 256, 8, dtype=torch.float16),
        "residual": torch.zeros(kv_heads, dim // 8, 256, 8, dtype=torch.float16),
        "coarse": torch.zeros(kv_heads, dim // 16, 256, 16, dtype=torch.float16) if dim % 16 == 0 else None,
    }
    return Books(**{**tensors, **changes})


def test_sizes_bytes_and_devices() -> None:
    own = books()
    assert (own.kv_heads, own.dim, own.device.type) == (2, 32, "cpu")
    assert own.nbytes == 2 * 32 * 256 * 2 * 3
    assert books(dim=24).nbytes == 2 * 24 * 256 * 2 * 2, "24 channels have no parts of 16"
    layer = LayerBooks(own, books(dim=16))
    assert layer.nbytes == own.nbytes + own.nbytes // 2
    assert layer.to(torch.device("cpu")) is layer
    moved = layer.to(torch.device("meta"))
    assert {part.device.type for side in (moved.keys, moved.values) for part in side.tensors().values()} == {"meta"}
    layer.check(2, 32, 16)
    for sizes in ((4, 32, 16), (2, 16, 16), (2, 32, 32)):
        with pytest.raises(ConfigError, match=f"this model has {sizes[0]} with {sizes[1]} and {sizes[2]}: collect"):
            layer.check(*sizes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fine": torch.zeros(2, 4, 256, dtype=torch.float16)}, r"have the shape \[kv_heads, dim // 8, 256, 8\]"),
        ({"fine": torch.zeros(2, 4, 128, 8, dtype=torch.float16)}, r"\[2, 4, 128, 8\].*expected .*\[2, 4, 256, 8\]"),
        ({"residual": torch.zeros(2, 3, 256, 8, dtype=torch.float16)}, r"\[2, 3, 256, 8\].*expected"),
        ({"coarse": None}, "expected .*coarse"),
        ({"fine": torch.zeros(2, 4, 256, 8)}, "are float16, got .*'fine': 'float32'"),
        ({"fine": torch.zeros(2, 4, 256, 8, dtype=torch.float16, device="meta")}, "one device, got .*meta"),
    ],
)
def test_what_is_no_codebook_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        books(**changes)


def test_keys_and_values_are_of_the_same_heads() -> None:
    with pytest.raises(ConfigError, match="keys are of 2 KV heads, and those of values of 4"):
        LayerBooks(books(), books(4))


def test_prompts_on_a_device_share_the_codebooks_there() -> None:
    layer, elsewhere = LayerBooks(books(), books(dim=16)), torch.device("meta")
    assert layer.to(torch.device("cpu")) is layer
    there = layer.to(elsewhere)
    assert there.keys.device == there.values.device == elsewhere
    assert layer.to(elsewhere) is there
    assert there.to(elsewhere) is there
