# SPDX-License-Identifier: Apache-2.0
"""The three operations on keys and values: score, compact, attend."""

from .compact import compact_kv
from .decode import decode_attention
from .scores import window_scores

__all__ = ["compact_kv", "decode_attention", "window_scores"]
