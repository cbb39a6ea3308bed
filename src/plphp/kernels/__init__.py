# SPDX-License-Identifier: Apache-2.0
"""The three operations on keys and values: score, compact, attend."""

from . import compact, decode, scores
from .compact import compact_kv
from .decode import decode_attention
from .scores import WindowScores, window_scores

TRIALS = {
    "window_scores": scores.triton_trial,
    "compact_kv": compact.triton_trial,
    "decode_attention": decode.triton_trial,
}
"""Each operation's trial of its Triton kernel, see `plphp.kernels.triton_choice`."""

__all__ = ["compact_kv", "decode_attention", "WindowScores", "window_scores"]
