# SPDX-License-Identifier: Apache-2.0
"""The operations on keys and values: score, compact, attend, and merge what was attended to in parts.

Each has a reference in torch and one function that its callers know; kernels in Triton and C++ stand beside the
reference and are tried against it before they are used, see `plphp.kernels.choice`. `plphp.kernels.ordering` puts
scores in order.
"""

from . import centroids, coded_attention, compact, decode, scores
from .compact import compact_kv
from .decode import decode_attention
from .merge import merge_states
from .scores import WindowScores, window_scores

TRIALS = {
    ("window_scores", "Triton"): scores.triton_trial,
    ("compact_kv", "Triton"): compact.triton_trial,
    ("decode_attention", "Triton"): decode.triton_trial,
    ("decode_attention", "C++"): decode.cpp_trial,
    ("attend_codes", "C++"): coded_attention.cpp_trial,
    ("nearest_centroids", "C++"): centroids.cpp_trial,
}
"""Trials of all kernels, by the operation and the language; see `plphp.kernels.choice`."""

__all__ = ["compact_kv", "decode_attention", "merge_states", "WindowScores", "window_scores"]
