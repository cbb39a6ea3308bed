# SPDX-License-Identifier: Apache-2.0
"""Eviction in whole blocks: what a method would evict is rounded down to a multiple of the block size."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.errors import UnsupportedFeatureError
from plphp.kernels.ordering import positions_in_order
from plphp.policy.evidence import LayerScores


def evict_whole_blocks(keep: Tensor, score: Tensor, scores: LayerScores, block_size: int) -> Tensor:
    """Keep so much more that what is evicted fills whole blocks.

    A block that is empty in part cannot go back to the pool. So each head gets back the best-scored of what it would
    have lost: fewer than ``block_size`` entries.

    Parameters
    ----------
    keep : Tensor
        bool [1, kv_heads, seq]; what the method keeps, as much in every head.
    score : Tensor
        float [1, kv_heads, seq]; the method's scores, higher is better.
    scores : LayerScores
        Scores of the layer, with the candidates for eviction.
    block_size : int
        Tokens of a block.

    Returns
    -------
    Tensor
        bool [1, kv_heads, seq]; the entries that stay in the cache.

    Raises
    ------
    UnsupportedFeatureError
        If the heads keep different numbers of entries, which one block table cannot hold.
    """
    evicted = set((~keep).sum(-1).flatten().tolist())
    if len(evicted) != 1:
        raise UnsupportedFeatureError(
            f"The KV heads of layer {scores.layer} evict different numbers of entries ({min(evicted)} to "
            f"{max(evicted)}), and in vLLM they share one block table: use a method that keeps as many in each head."
        )
    extra = evicted.pop() % block_size
    if extra:
        left = scores.candidates[:, None] & ~keep
        score = score.clamp(min=torch.finfo(score.dtype).min)  # candidates of score -inf come before the rest of a head
        keep = keep | (left & (positions_in_order(score.masked_fill(~left, -torch.inf)) < extra))
    return keep
