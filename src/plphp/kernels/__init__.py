# SPDX-License-Identifier: Apache-2.0
"""The three operations on keys and values: score, compact, attend."""

from .compact import compact_kv
from .decode import decode_attention
from .scores import WindowScores, window_scores

__all__ = ["compact_kv", "decode_attention", "WindowScores", "window_scores"]
