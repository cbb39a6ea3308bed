# SPDX-License-Identifier: Apache-2.0
"""The three operations on keys and values: score, compact, attend."""

from . import compact, decode, scores
from .compact import compact_kv
from .decode import decode_attention
from .scores import WindowScores, window_scores

TRIALS = {
    ("window_scores", "Triton"): scores.triton_trial,
    ("compact_kv", "Triton"): compact.triton_trial,
    ("decode_attention", "Triton"): decode.triton_trial,
    ("decode_attention", "C++"): decode.cpp_trial,
}
"""Trials of all kernels, by the operation and the language; see `plphp.kernels.choice`."""

__all__ = ["compact_kv", "decode_attention", "WindowScores", "window_scores"]
