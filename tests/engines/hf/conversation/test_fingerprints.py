# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of images: what changes them, and what does not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from plphp.engines.hf.conversation.fingerprints import fingerprint, same_image

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def image(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50
    return noise.abs().to(dtype)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return same_image(fingerprint({"pixel_values": first}), fingerprint({"pixel_values": second}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_change_is_seen(dtype: torch.dtype) -> None:
    pixels = image(dtype, 3, 5, 7)
    assert same(pixels, pixels.clone())
    assert same(pixels, pixels.transpose(0, 1).contiguous().transpose(0, 1))
    for place in range(pixels.numel()):
        other = pixels.clone()
        other.view(-1)[place] += 1
        assert not same(pixels, other)
    for changed in (pixels.flip(0), pixels.flip(1), pixels.flip(2), pixels.roll(1, 2), pixels.roll(1, 1)):
        assert not same(pixels, changed)
    assert not same(pixels[:1, :1], pixels[:1, :1].transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_with_zeros_is_not(dtype: torch.dtype) -> None:
    pixels = image(dtype, 3, 5, 7)
    assert same(pixels, pad(pixels, (0, 4, 0, 9)))
    assert same(pixels, pad(pixels, (0, 0, 0, 0, 0, 2)))
    assert not same(pixels, pad(pixels, (1, 0)))


def test_long_videos_are_marked_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    video = image(torch.float32, 11, 3, 5)
    whole = fingerprint({"pixel_values": video})
    monkeypatch.setattr("plphp.engines.hf.conversation.fingerprints.BLOCK", 12)
    assert same_image(whole, fingerprint({"pixel_values": video}))
    assert not same_image(whole, fingerprint({"pixel_values": video.flip(0)}))


def test_nothing() -> None:
    assert same(torch.zeros(0, 3), torch.zeros(0, 3))


def test_one_number() -> None:
    assert same(torch.tensor(3), torch.tensor([3]))
    assert not same(torch.tensor(3), torch.tensor(4))


def test_masks_of_truth_values() -> None:
    mask = torch.tensor([[True, True, False]])
    assert same(mask, mask.clone())
    assert not same(mask, torch.tensor([[True, False, True]]))


def test_nan_is_what_it_is() -> None:
    pixels = image(torch.float32, 2, 3)
    pixels[0, 1] = torch.nan
    assert same(pixels, pixels.clone())


def test_what_cannot_be_compared_is_not() -> None:
    pixels = image(torch.float32, 2, 3)
    assert same(pixels, pixels.bfloat16())
    assert same_image(fingerprint({"pixel_values": pixels}), fingerprint({"other": pixels + 1}))
    assert fingerprint({"pixel_values": [1, 2]}) == {}
