# SPDX-License-Identifier: Apache-2.0
"""Relevance to a text: its sign, its range, and what has none."""

from __future__ import annotations

import pytest
import torch

from plphp.policy.relevance import relevance

TEXT = torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)


def test_it_is_the_negative_mean_cosine_from_0_to_1() -> None:
    # Mean cosines with the two axes: 1/2, 1/sqrt(2), 0 and -1/2.
    features = torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, -1.0], [0.0, -4.0]], dtype=torch.float64)
    cosine = torch.tensor([0.5, 0.5**0.5, 0.0, -0.5], dtype=torch.float64)
    expected = (0.5**0.5 - cosine) / (0.5**0.5 + 0.5)
    torch.testing.assert_close(relevance(features, TEXT), expected, rtol=0, atol=1e-12)


def test_the_mean_over_the_text_is_one_of_cosines() -> None:
    """A long embedding does not count for more, and an order of the text tokens is none."""
    generator = torch.Generator().manual_seed(0)
    features, text = torch.randn(50, 8, generator=generator).double(), torch.randn(7, 8, generator=generator).double()
    expected = -torch.nn.functional.cosine_similarity(features[:, None], text, dim=-1).mean(1)
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    for same in (text, text.flip(0), text * torch.logspace(-9, 9, 7)[:, None]):
        torch.testing.assert_close(relevance(features, same), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_differ_by_rounding_alone_are_equally_relevant(dtype: torch.dtype) -> None:
    direction = torch.randn(1, 96, generator=torch.Generator().manual_seed(1))
    features = direction.to(dtype) * torch.arange(1, 21)[:, None]
    scores = relevance(features, torch.randn(5, 96, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(scores, torch.ones(20, dtype=dtype))
    assert torch.equal(relevance(features[:1], features), torch.ones(1, dtype=dtype))


def test_features_of_16_bits_give_scores_of_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    features = (1 + 0.1 * torch.randn(60, 32, generator=generator)).bfloat16()
    text = torch.randn(4, 32, generator=generator).bfloat16()
    expected = relevance(features.double(), text.double())
    with torch.autocast("cpu", torch.bfloat16):
        scores = relevance(features, text)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)
