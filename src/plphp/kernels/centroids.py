# SPDX-License-Identifier: Apache-2.0
"""Product codes: the nearest of the centroids of every few channels, and the centroids again."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _nearest_cpp, choice

AT_ONCE = 2**22
"""Distances to centroids that are held at once."""


def nearest(states: Tensor, book: Tensor, head: Tensor) -> Tensor:
    """The nearest centroid of each part of each entry.

    On a CPU a C++ kernel searches, which is built when it is first used.

    Parameters
    ----------
    states : Tensor
        [entries, dim].
    book : Tensor
        [kv_heads, parts, 256, channels].
    head : Tensor
        int64 [entries]; the KV head of each.

    Returns
    -------
    Tensor
        uint8 [entries, parts].
    """
    # Only what is searched in float32 is searched often: what the C++ kernel is not made for is not logged.
    suits = _nearest_cpp.unsupported(states, book) is None
    if suits and choice.usable("nearest_centroids", "C++", None, cpp_trial, states, states):
        return _nearest_cpp.nearest(states, book, head)
    return reference(states, book, head)


def cpp_trial(device: torch.device, _: choice.Dtypes, dim: int, __: int) -> float:
    """How much further the C++ kernel's centroids are than the nearest, on a small case, in squared distance.

    Raises
    ------
    BackendUnavailableError
        If it cannot be built.
    """
    generator = torch.Generator().manual_seed(0)
    worst = []
    for channels in (8, 16):
        parts = -(-dim // channels)
        book = torch.randn(2, parts, 256, channels, generator=generator, device="cpu")
        states = torch.randn(50, parts * channels, generator=generator, device="cpu")
        head = torch.arange(50, device="cpu") % 3 % 2
        chosen = [centroids(search(states, book, head), book, head) for search in (_nearest_cpp.nearest, reference)]
        ours, nearest_of_all = ((states - own).double().unflatten(1, (parts, -1)).square().sum(2) for own in chosen)
        worst.append((ours - nearest_of_all).abs().max())
    return torch.stack(worst).max().item()  # NaN if any is


def reference(states: Tensor, book: Tensor, head: Tensor) -> Tensor:
    """As `nearest`, in torch."""
    heads, parts, size, channels = book.shape
    order = head.argsort(stable=True)
    numbers = torch.empty(len(states), parts, dtype=torch.uint8, device=states.device)
    length = book.square().sum(3)
    for number, entries in enumerate(order.split(torch.bincount(head, minlength=heads).tolist())):
        for some in entries.split(max(1, AT_ONCE // (parts * size))):
            of_part = states[some].unflatten(1, (parts, channels)).transpose(0, 1)
            # |x - c|^2 less |x|^2, which no centroid changes.
            distance = torch.baddbmm(length[number][:, None], of_part, book[number].mT, alpha=-2)
            numbers[some] = distance.argmin(2).T.to(torch.uint8)
    return numbers


def centroids(numbers: Tensor, book: Tensor, head: Tensor) -> Tensor:
    """The centroids of some numbers, uint8 [entries, parts], side by side: [entries, dim]."""
    parts = book.shape[1]
    return book[head[:, None], torch.arange(parts, device=numbers.device), numbers.long()].flatten(1)
