# SPDX-License-Identifier: Apache-2.0
"""Query rows that are drawn at random from a prompt, beside those at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans


def with_random_rows(queries: Tensor, spans: VisionSpans, number: int, seed: int) -> Tensor:
    """Add tokens of the prompt to query rows.

    Which are drawn depends on the seed and on how many tokens a row of the batch has, not on its padding or on the
    other rows.

    Parameters
    ----------
    queries : Tensor
        bool [batch, seq]; the query rows that are there.
    spans : VisionSpans
        Where the prompt begins, and its padding.
    number : int
        How many are drawn for each row of the batch, or all that are left.
    seed : int
        Of the draws.

    Returns
    -------
    Tensor
        bool [batch, seq].
    """
    if number == 0:
        return queries
    drawn = queries.clone()
    left = spans.valid & ~queries
    left[:, : spans.start] = False
    for row, tokens in enumerate(left):
        position = tokens.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed % 2**63)
        drawn[row, position[torch.randperm(len(position), generator=generator)[:number]]] = True
    return drawn
