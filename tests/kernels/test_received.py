# SPDX-License-Identifier: Apache-2.0
"""Attention received within a sequence, against the softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plphp.kernels import received
from plphp.kernels.received import received_attention
from precision import assert_exact

pytestmark = pytest.mark.usefixtures("float64")


def drawn(batch: int = 2, q_heads: int = 4, kv_heads: int = 2, seq: int = 7) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(batch, q_heads, seq, 5).double(), torch.randn(batch, kv_heads, seq, 5).double()


def naive(query: Tensor, key: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """By loops over batch and rows; visible [batch, seq, seq]."""
    batch, q_heads, seq, _ = query.shape
    mean = torch.zeros(batch, seq, seq).double()
    for b in range(batch):
        for h in range(q_heads):
            keys = key[b, h * key.shape[1] // q_heads]
            for i in range(seq):
                shown = visible[b, i].nonzero()[:, 0]
                if len(shown):
                    mean[b, i, shown] += ((keys[shown] @ query[b, h, i]) * 0.5).softmax(0) / q_heads
    total = torch.zeros(batch, seq).double()
    for b in range(batch):
        for j in range(seq):
            rows = [i for i in range(seq) if visible[b, i, i] and visible[b, i, j]]
            total[b, j] = mean[b, rows, j].mean() if rows else 0
    return total, mean


def masks(seq: int = 7) -> dict[str, Tensor | None]:
    padded = torch.arange(seq) < torch.tensor([[5], [7]])
    blocks = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).bool()[None, None]
    least = torch.finfo(torch.float32).min
    return {
        "none": None,
        "padding": padded[:, None, None],
        "padding of both": padded[:, None, None] & padded[:, None, :, None],
        "blocks": blocks,
        "added": torch.zeros(blocks.shape, dtype=torch.float32).masked_fill(~blocks, least),
        "added infinities": torch.zeros(blocks.shape).masked_fill(~blocks, -torch.inf),
    }


@pytest.mark.parametrize("at_once", [1, 60, 2**24])
@pytest.mark.parametrize("name", masks())
def test_it_is_the_mean_of_the_softmax(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received, "MASS_AT_ONCE", at_once)
    query, key = drawn()
    mask = masks()[name]
    visible = torch.ones(2, 7, 7, dtype=torch.bool)
    if mask is not None:
        shown = mask if mask.dtype is torch.bool else mask == 0
        visible = shown.expand(2, 1, 7, 7)[:, 0]
    expected, rows = naive(query, key, visible)
    actual, row = received_attention(query, key, mask, 0.5, row=-5)
    assert_exact(actual, expected)
    assert row is not None
    assert_exact(row, rows[:, 2])
    assert received_attention(query, key, mask, 0.5)[1] is None


def test_it_sums_to_one_over_what_sees_each_other() -> None:
    query, key = drawn()
    scores, _ = received_attention(query, key, masks()["blocks"], 0.5)
    assert_exact(scores.split([3, 4], dim=1)[0].sum(1), torch.ones(2).double())
    assert_exact(scores.split([3, 4], dim=1)[1].sum(1), torch.ones(2).double())
    padded, _ = received_attention(query, key, masks()["padding"], 0.5)
    assert (padded[0, 5:] == 0).all()
    assert_exact(padded.sum(1), torch.ones(2).double())


@pytest.mark.own_dtype
def test_it_is_float32_and_no_graph_under_autocast() -> None:
    query, key = (part.bfloat16().requires_grad_() for part in drawn())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, _ = received_attention(query, key, None, 0.5)
    expected, _ = received_attention(query.float(), key.float(), None, 0.5)
    assert scores.dtype is torch.float32
    assert not scores.requires_grad
    assert torch.equal(scores, expected)
