# SPDX-License-Identifier: Apache-2.0
"""Product codes: the nearest of the centroids of every few channels, and the centroids again."""

from __future__ import annotations

import torch
from torch import Tensor

AT_ONCE = 2**22
"""Distances to centroids that are held at once."""


def nearest(states: Tensor, book: Tensor, head: Tensor) -> Tensor:
    """The nearest centroid of each part of each entry.

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
