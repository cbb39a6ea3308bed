# SPDX-License-Identifier: Apache-2.0
"""Entries that some methods keep whatever their scores: attention sinks at the start of a prompt, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.policy.evidence import SINKS, LayerScores

if TYPE_CHECKING:
    from torch import Tensor


def sinks(scores: LayerScores) -> Tensor:
    """bool [batch, seq]; the first tokens of each row's conversation."""
    return scores.valid & (scores.need("token_number") < SINKS)


def last_token(scores: LayerScores) -> Tensor:
    """bool [batch, seq]; the last token of each row."""
    number = scores.need("token_number").masked_fill(~scores.valid, -1)
    return scores.valid & (number == number.amax(1, keepdim=True))


def above_all(score: Tensor, protected: Tensor, scores: LayerScores) -> Tensor:
    """Put the ``protected`` entries, bool [batch, seq], above all others of a score [batch, kv_heads, seq].

    Scores stay finite: a mean over neighbouring tokens (``score_pool``) is taken of them.
    """
    best = score.where(scores.valid[:, None], 0).amax((1, 2), keepdim=True).clamp(min=0)
    return score.where(~protected[:, None], 2 * best + 1)
